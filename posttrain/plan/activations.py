"""What a transformer layer keeps for its backward pass, and what the loss needs: named terms in bytes.

Each term is a tensor that some operation saves; which ones do was read from Megatron-Core 0.19, Transformer Engine 2.18
and this project's fused LoRA. A tensor saved by two operations is one term.
"""

from posttrain.ops.chunk_sizes import LOGIT_ROWS
from posttrain.spec.run_spec import RunSpec
from posttrain.spec.shape import Adapters


def saved_activations(s: RunSpec) -> dict[str, float]:
    """Bytes per token that one layer keeps on one GPU, without recomputation.

    The residual stream is divided by sequence parallelism, everything between two matrices by tensor parallelism.
    """
    shape, n, split = s.known_shape, s.width, s.tensor
    family = shape.family
    stream = _residual_stream(s)
    # An adapter beside a divided layer gets the norm's output gathered.
    normed = stream if s.adapters is None else shape.hidden * n
    inner = shape.ffn * n / split * (s.expert_rows or shape.chosen or 1)
    terms = {
        "layer input": stream,
        "norm before attention": normed * _share_kept(s, "linear_qkv"),
        "query, key, value": _query_key_value(s) * n / split,
        "attention output": shape.query * n / split,
        "attention scores": attention_scores(s),
        "norm before MLP": normed * _share_kept(s, "linear_fc1"),
        "MLP first matrix": inner,
        "MLP activation": inner * _share_kept(s, "linear_fc2"),
    }
    if family.qk_norm:
        inputs = shape.query + shape.key
        if s.one_operation:  # the joint tensor, values as well
            inputs += shape.key
        terms["inputs of query and key norms"] = inputs * n / split
    if not is_unfused(s):
        terms["softmax statistics"] = shape.heads * 4 / split
    if s.context > 1 and s.heads_exchanged:
        terms["attention output of own heads"] = shape.query * n / split
    if family.norms == 4:
        terms["inputs of output norms"] = 2 * stream
    if not shape.parallel_residual:
        terms["MLP input"] = stream
    if family.gate:
        terms["MLP first matrix"] = 2 * inner
        fused = family.fused_gate and shape.silu_gate
        if not fused and not s.computed_again("linear_fc2"):
            # The activation, and what it multiplies: Megatron adds glu_linear_offset to that, a copy even if 0.
            terms["MLP gate"] = 2 * inner
    if shape.dropout:
        terms["dropout masks"] = 2 * stream / n
    if shape.experts:  # the router works in fp32
        terms["norm before MLP"] = normed
        terms["router"] = shape.experts * 3 * 4.0
    if s.grouped_experts:
        terms["MLP activation"] = terms["MLP gate"] = 0.0
        terms["rows of experts"] = s.expert_rows * (3 * 8 + 4.0)  # three numbers of 64 bits, and a weight
        terms["sums of MLP activations"] = s.expert * shape.ffn * n * s.trains("linear_fc2")
    elif shape.experts:  # tokens are copied to each expert that they visit
        terms["tokens at their experts"] = shape.hidden * n * shape.chosen * s.trains("linear_fc1")
        terms["experts' weights applied"] = inner
    if s.adapters:
        terms |= _saved_by_adapters(s, s.adapters)
    return terms


def _residual_stream(s: RunSpec) -> float:
    """Bytes of a token's residual stream on one GPU."""
    stream = s.known_shape.hidden * s.width
    return stream / s.tensor if s.sequence_parallel else stream


def _share_kept(s: RunSpec, linear: str) -> float:
    """How much of a linear layer's input is kept for the gradient of its weight, of what its tensor has."""
    if s.computed_again(linear):
        return 0.0
    share = s.trains(linear)
    return share / 2 if s.precision == "fp8" else share


def _saved_by_adapters(s: RunSpec, adapters: Adapters) -> dict[str, float]:
    """Rank-wide products; DoRA keeps each adapted layer's output too, for the gradient of its magnitudes."""
    products = outputs = 0.0
    for linear in s.known_shape.linears:
        if linear.name not in adapters.sizes:
            continue
        share = s.trains(linear.name)
        products += share * adapters.rank * s.width
        if linear.name in ("linear_qkv", "linear_fc1"):
            outputs += share * linear.outputs * s.width / s.tensor
        else:
            outputs += share * _residual_stream(s)
    terms = {"low-rank products": products}
    if adapters.kind == "DoRA":
        terms["outputs before their magnitudes"] = outputs
    return terms


def is_unfused(s: RunSpec) -> bool:
    """Whether attention is Transformer Engine's of single operations: no kernel of it has fp32."""
    return s.precision == "fp32" and s.transformer_engine and s.known_shape.score_softcap is None


def _padded(s: RunSpec) -> tuple[int, float]:
    """Sequences of a micro-batch and the length that unfused attention pads each of them to."""
    longest = s.length
    if s.longest and not s.cuda_graph:
        longest = s.longest
    return max(s.sequences, s.micro_batch), longest


def _query_key_value(s: RunSpec) -> float:
    """Numbers per token; attention of single operations has key and value once for each head."""
    shape = s.known_shape
    if is_unfused(s):
        sequences, longest = _padded(s)
        return 3 * shape.query * sequences * longest / s.tokens
    if keeps_capped_scores(s):
        return 3 * shape.query
    return shape.query + 2 * shape.key


def keeps_capped_scores(s: RunSpec) -> bool:
    """Whether attention is written out, soft-capped."""
    return s.known_shape.score_softcap is not None and not s.capped_kernels


def attention_scores(s: RunSpec) -> float:
    """Bytes of attention scores per token, where they are kept: of soft-capped attention written out, and any in fp32.

    On a CPU the former is computed sequence by sequence, on a GPU over the whole row.
    """
    shape = s.known_shape
    heads = shape.heads / s.tensor
    if keeps_capped_scores(s):  # posttrain.ops.attention: tanh and softmax in fp32, softmax in bf16, masks
        keys = s.tokens if s.device == "cuda" else s.squares or s.length
        return heads * (8 + s.width) * keys
    if is_unfused(s):  # the softmax, the softmax with padding set to 0, and the mask
        sequences, longest = _padded(s)
        return (heads * 8 + 1) * longest**2 * sequences / s.tokens
    return 0.0


def backward_workspace(s: RunSpec) -> float:
    """Bytes per token that the backward pass of one layer needs beside what is kept.

    Its largest moment is the MLP's activation: the gradient of the residual stream, those of the activation's output
    and input, and the output itself where it is computed again, else less the output that was kept.
    """
    shape = s.known_shape
    inner = shape.ffn * s.width / s.tensor * (s.expert_rows or shape.chosen or 1)
    tensors = 3 if shape.family.gate else 2  # the activation's inputs and output
    if s.grouped_experts:
        # The rows of all experts: of the stream's gradient, and of the first matrix's products. Of expert parallelism
        # also what was gathered, and its gradient before the processes' sum.
        gathered = 0
        if s.expert > 1:
            gathered = 2 * s.expert
        return _residual_stream(s) * (1 + gathered + s.expert_rows) + 2 * inner
    output = 1.0 if s.computed_again("linear_fc2") else -s.trains("linear_fc2")
    return _residual_stream(s) + inner * (tensors + output)


def loss_workspace(s: RunSpec) -> dict[str, float]:
    """Bytes of the final norm, the output layer and the loss on the last stage, at their largest."""
    shape, n = s.known_shape, s.width
    stream = shape.hidden * n
    vocab = shape.vocab / s.tensor
    rows = s.tokens
    terms = {"final norm": 2 * s.tokens * _residual_stream(s)}
    if s.supervised_logits_only:
        rows = round(s.tokens * s.supervised_share)
        terms["states of supervised tokens"] = rows * stream
    if s.adapters and s.supervised_logits_only and s.transformer_engine:
        # One chunk after the other, in the number format of the weights; the gradient is put in its place.
        terms["gradient of supervised tokens"] = rows * stream
        terms["logits"] = min(rows, LOGIT_ROWS) * vocab * n
    else:  # the loss writes the logits' gradient in fp32; local layers keep the fp32 probabilities too
        fp32 = 4 if s.transformer_engine else 8
        terms["logits"] = rows * vocab * (n + fp32)
        if shape.softcap:
            terms["soft-capped logits"] = rows * vocab * 2 * n
    return terms
