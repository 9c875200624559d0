"""Memory of one GPU by part: what is always there, and the most that a step adds to it."""

from dataclasses import dataclass

from posttrain.plan import activations
from posttrain.plan.setting import Setting
from posttrain.plan.shape import Linear

GIB = 2**30
# In torch's allocator: workspaces of 32 MiB, cuBLAS' and Transformer Engine's. A CUDA graph is captured on a stream
# that has workspaces of its own, and keeps the batches and losses of a step; 0.14 GiB was measured, not itemised.
WORKSPACE, GRAPH = 0.06 * GIB, 0.14 * GIB
# What the driver and the kernels take outside of it, and NCCL's buffers.
CONTEXT, NCCL = 0.55 * GIB, 1.0 * GIB
# Allocated memory comes in blocks that never fit quite.
FRAGMENTS = 0.03


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU of a pipeline stage.

    Attributes:
        parts: what torch allocates at the peak, by part.
        outside: what the driver and NCCL take besides.
        detail: what the activations of one layer and the loss consist of: bytes by term.
    """

    parts: dict[str, float]
    outside: float
    detail: dict[str, dict[str, float]]

    @property
    def peak(self) -> float:
        """What torch reports as the most allocated."""
        return sum(self.parts.values())

    @property
    def needed(self) -> float:
        """What the GPU has to have."""
        return self.peak * (1 + FRAGMENTS) + self.outside


def memory(s: Setting) -> Memory:
    """The fullest stage's."""
    return max((stage(s, index) for index in {0, s.pipeline - 1}), key=lambda found: found.needed)


def stage(s: Setting, index: int) -> Memory:
    """Memory of a GPU of the pipeline stage `index`, from 0."""
    weights, trained, expert_weights, expert_trained = parameters(s, index)
    n = s.width
    shards = s.data_parallel * s.context
    state = {"adam": 8, "sgd": 4}[s.optimizer] + (4 if n == 2 else 0)  # moments, and fp32 copies of 16-bit weights
    divided = shards if s.distributed_optimizer else 1
    experts_divided = max(1, shards // s.expert) if s.distributed_optimizer else 1
    parts = {
        "weights": _bytes_of_weights(s, weights + expert_weights, s.shape.layers / s.pipeline),
        "gradients": 4.0 * (trained + expert_trained),  # summed in fp32
        "optimizer": state * (trained / divided + expert_trained / experts_divided),
    }
    if s.fsdp:  # divided as well; two layers are gathered at a time
        layer = (weights + expert_weights) / max(1, s.shape.layers // s.pipeline)
        parts["weights"] = parts["weights"] / shards + 2 * n * layer
        parts["gradients"] = parts["gradients"] / shards + (4 * layer if s.adapters is None else 0)
    first, last = index == 0, index == s.pipeline - 1
    layers = s.shape.layers / s.pipeline
    in_flight = min(s.pipeline - index, s.micro_batches)
    per_token = activations.kept(s)
    full = s.recompute == "full"
    held = per_token["layer input"] if full else sum(per_token.values())
    parts["activations"] = s.tokens * layers * held * in_flight
    one_more = s.tokens * sum(per_token.values()) if full else 0.0  # the layer that is computed again
    loss = activations.loss(s) if last else {}
    backward = one_more + s.tokens * activations.passing(s) + _weight_gradients(s, first and last)
    # Either the loss is being computed, or the layer before it goes backward.
    if sum(loss.values()) >= backward:
        parts["logits and loss"] = sum(loss.values())
    else:
        parts["backward pass"] = backward
    parts["workspace"] = WORKSPACE + (GRAPH if s.captured else 0)
    outside = CONTEXT + (NCCL if s.world > 1 else 0)
    return Memory(parts, outside, {"layer": {k: s.tokens * v for k, v in per_token.items() if v}, "loss": loss})


def parameters(s: Setting, index: int) -> tuple[float, float, float, float]:
    """Parameters of one GPU of a stage: all and trained ones outside of experts, all and trained ones of experts."""
    shape, adapters = s.shape, s.adapters
    share = 1 / s.pipeline
    dense = sum(_matrix(linear, s.tensor) for linear in shape.linears if not linear.experts)
    experts = sum(_matrix(linear, s.tensor) for linear in shape.linears if linear.experts) / s.expert
    weights = share * shape.layers * (dense + shape.layer_others)
    vocab = -(-shape.vocab // s.tensor) * shape.hidden
    if index == 0:
        weights += vocab + shape.positions * shape.hidden
    if index == s.pipeline - 1:
        weights += shape.norm + (0 if shape.tied and s.pipeline == 1 else vocab)
    expert_weights = share * shape.layers * experts
    if adapters is None:
        return weights, weights, expert_weights, expert_weights
    trained, expert_trained = 0.0, 0.0
    for linear in shape.linears:
        layers, size = adapters.sizes.get(linear.name, (0, 0))
        mine = share * layers * size / s.tensor
        if linear.experts and size > adapters.rank * (linear.inputs + linear.outputs):  # an adapter for each expert
            expert_trained += mine / s.expert
        else:
            trained += mine
    return weights + trained + expert_trained, trained, expert_weights, expert_trained


def _matrix(linear: Linear, tensor: int) -> float:
    """Parameters of one process's part of a linear layer; a bias after a divided input is whole."""
    bias = linear.outputs if linear.bias else 0
    whole = linear.name in ("linear_proj", "linear_fc2")
    return max(linear.experts, 1) * (linear.inputs * linear.outputs / tensor + bias / (1 if whole else tensor))


def _bytes_of_weights(s: Setting, count: float, layers: float) -> float:
    """Bytes of `count` parameters in `layers` layers' adapted matrices and elsewhere.

    A frozen 8-bit weight has an fp32 scale for each output. Transformer Engine's own fp8 keeps weights as they are and
    transposed, one byte each: as much as bf16.
    """
    if not s.eight_bit_base:
        return s.width * count
    matrices = sum(linear.inputs * linear.outputs * s.trains(linear.name) for linear in s.shape.linears)
    scales = sum(4 * linear.outputs * s.trains(linear.name) for linear in s.shape.linears)
    return 2 * count + layers * (scales - matrices)


def _weight_gradients(s: Setting, whole: bool) -> float:
    """Gradients on their way to the fp32 sums: the largest matrix's, and the output layer's until the embedding's."""
    if s.adapters is not None:
        return 0.0
    shape, n = s.shape, s.width
    largest = max(linear.inputs * linear.outputs for linear in shape.linears) * n / s.tensor
    return largest + (n * shape.vocab * shape.hidden / s.tensor if shape.tied and whole else 0.0)
