"""What a transformer layer keeps for its backward pass, and what the loss needs: named terms in bytes.

Each term is a tensor that some operation saves; which ones do was read from Megatron-Core 0.19, Transformer Engine 2.18
and this project's fused LoRA. A tensor saved by two operations is one term.
"""

from posttrain.spec.run_spec import RunSpec

CHUNK = 2048  # rows of logits that posttrain.ops.linear_cross_entropy holds at once


def kept(s: RunSpec) -> dict[str, float]:
    """Bytes per token that one layer keeps on one GPU, without recomputation.

    The residual stream is divided by sequence parallelism, everything between two matrices by tensor parallelism.
    """
    shape, family, n = s.shape, s.shape.family, s.width
    split = s.tensor
    stream = shape.hidden * n / (split if s.sequence_parallel else 1)
    # An adapter beside a divided layer gets the norm's output gathered.
    normed = stream if s.adapters is None else shape.hidden * n
    kept_before = {
        linear: 0.0 if s.computed_again(linear) else s.trains(linear) * (0.5 if s.precision == "fp8" else 1.0)
        for linear in ("linear_qkv", "linear_fc1", "linear_fc2")
    }
    fused_mlp = family.fused_gate or s.computed_again("linear_fc2")
    inner = shape.ffn * n / split * (shape.chosen or 1)
    terms = {
        "layer input": stream,
        "norm before attention": normed * kept_before["linear_qkv"],
        "query, key, value": _query_key_value(s) * n / split,
        "inputs of query and key norms": (shape.query + shape.key) * n / split if family.qk_norm else 0.0,
        "attention output": shape.query * n / split,
        "softmax statistics": 0.0 if unfused(s) else shape.heads * 4 / split,
        "attention scores": scores(s),
        "inputs of output norms": 2 * stream if family.norms == 4 else 0.0,
        "MLP input": 0.0 if shape.parallel_residual else stream,
        "norm before MLP": normed * kept_before["linear_fc1"],
        "MLP first matrix": inner * (2 if family.gate else 1),
        # The gate's activation, and what it multiplies: Megatron adds glu_linear_offset to that, a copy even if 0.
        "MLP gate": 2 * inner if family.gate and not fused_mlp else 0.0,
        "MLP activation": inner * kept_before["linear_fc2"],
        "dropout masks": 2 * stream / n if shape.dropout else 0.0,
    }
    if shape.experts:  # tokens are copied to each expert that they visit; the router works in fp32
        terms["norm before MLP"] = normed
        terms["router"] = shape.experts * 3 * 4.0
        terms["tokens at their experts"] = shape.hidden * n * shape.chosen * s.trains("linear_fc1")
        terms["experts' weights applied"] = inner
    if s.adapters:
        terms |= _adapters(s, stream)
    return terms


def _adapters(s: RunSpec, stream: float) -> dict[str, float]:
    """Rank-wide products; DoRA keeps each adapted layer's output too, for the gradient of its magnitudes."""
    shape, n = s.shape, s.width
    found = {"low-rank products": sum(map(s.trains, s.adapters.sizes)) * s.adapters.rank * n}
    if s.adapters.kind == "DoRA":
        outputs = {
            linear.name: linear.outputs * n / s.tensor if linear.name in ("linear_qkv", "linear_fc1") else stream
            for linear in shape.linears
        }
        found["outputs before their magnitudes"] = sum(outputs[name] * s.trains(name) for name in s.adapters.sizes)
    return found


def unfused(s: RunSpec) -> bool:
    """Whether attention is Transformer Engine's of single operations: no kernel of it has fp32."""
    return s.precision == "fp32" and s.transformer_engine and not s.shape.family.attention_scores


def _padded(s: RunSpec) -> tuple[int, float]:
    """Sequences of a micro-batch and the length that unfused attention pads each of them to."""
    return max(s.sequences, s.micro_batch), s.length if s.cuda_graph else s.longest or s.length


def _query_key_value(s: RunSpec) -> float:
    """Numbers per token; attention of single operations has key and value once for each head."""
    shape = s.shape
    if unfused(s):
        sequences, longest = _padded(s)
        return 3 * shape.query * sequences * longest / s.tokens
    if shape.family.attention_scores:
        return 3 * shape.query
    return shape.query + 2 * shape.key


def scores(s: RunSpec) -> float:
    """Bytes of attention scores per token, where the kernel keeps them: soft-capped ones, and any in fp32."""
    shape = s.shape
    if shape.family.attention_scores:  # posttrain.ops.attention: tanh and softmax in fp32, softmax in bf16, masks
        return shape.heads / s.tensor * (8 + s.width) * (s.squares or s.length)
    if unfused(s):  # the softmax, the softmax with padding set to 0, and the mask
        sequences, longest = _padded(s)
        return (shape.heads / s.tensor * 8 + 1) * longest**2 * sequences / s.tokens
    return 0.0


def passing(s: RunSpec) -> float:
    """Bytes per token that the backward pass of one layer needs beside what is kept.

    Its largest moment is the MLP's activation: the gradient of the residual stream, those of the activation's output
    and input, and the output itself where it is computed again, else less the output that was kept.
    """
    shape, n = s.shape, s.width
    inner = shape.ffn * n / s.tensor * (shape.chosen or 1)
    stream = shape.hidden * n / (s.tensor if s.sequence_parallel else 1)
    output = 1.0 if s.computed_again("linear_fc2") else -s.trains("linear_fc2")
    return stream + inner * ((2 if shape.family.gate else 1) + 1 + output)


def loss(s: RunSpec) -> dict[str, float]:
    """Bytes of the final norm, the output layer and the loss on the last stage, at their largest."""
    shape, n = s.shape, s.width
    stream = shape.hidden * n
    vocab = shape.vocab / s.tensor
    rows = round(s.tokens * (s.supervised_share if s.supervised_logits_only else 1))
    terms = {"final norm": 2 * s.tokens * stream / (s.tensor if s.sequence_parallel else 1)}
    if s.supervised_logits_only:
        terms["states of supervised tokens"] = rows * stream
    if s.adapters and s.supervised_logits_only and s.transformer_engine:
        # One chunk after the other, in the number format of the weights; the gradient is put in its place.
        terms["gradient of supervised tokens"] = rows * stream
        terms["logits"] = min(rows, CHUNK) * vocab * n
    else:  # the loss writes the logits' gradient in fp32; local layers keep the fp32 probabilities too
        terms["logits"] = rows * vocab * (n + 4 + (0 if s.transformer_engine else 4))
    if shape.softcap:
        terms["soft-capped logits"] = rows * vocab * 2 * n
    return terms
