"""The output layer and its loss, for the supervised tokens only.

A prompt's tokens need no logits. With a vocabulary of 128 k the output layer is a fifth of a 1B
model's work and most of its memory, so the hidden states of supervised positions are selected before
it. Where its weight is frozen (LoRA), loss and input gradient are computed together in chunks and
the logits of more than one chunk never exist; the idea is that of Liger's fused linear cross
entropy (Hsu et al. 2024, arXiv:2410.10989). Liger's kernel isn't used: importing the package loads
PEFT and scikit-learn, which takes as long as everything else of a start.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist

from posttrain.ops.chunk_sizes import LOGIT_ROWS

if TYPE_CHECKING:
    from megatron.core.transformer import TransformerConfig


def supervised_losses(
    *,
    hidden_states: torch.Tensor,
    output_layer: torch.nn.Module,
    output_weight: torch.Tensor | None,
    labels: torch.Tensor,
    context: torch.Tensor,
    compute_language_model_loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    config: "TransformerConfig",
    **unused: object,
) -> torch.Tensor:
    """Return the losses of the positions in `context`; the output processor of Megatron's GPTModel.

    Where tensor parallelism divides the vocabulary, the output layer is frozen.

    Args:
        hidden_states: [t, 1, h] of the last layer, [t/n, 1, h] with sequence parallelism.
        output_layer: the model's vocabulary projection.
        output_weight: [v, h], a part of it where it is divided, the embedding where it is shared, else None.
        labels: [1, t].
        context: int64[k], positions to compute the loss of; a position may be repeated to fill up.
        compute_language_model_loss: (labels [1, k], logits [k, 1, v]) -> losses [1, k].
        config: the model's configuration.

    Returns:
        float32[1, k].
    """
    weight = cast(torch.Tensor, output_layer.weight if output_weight is None else output_weight)
    bias = cast("torch.Tensor | None", getattr(output_layer, "bias", None))
    softcap: float | None = getattr(config, "final_logit_softcapping", None)
    tokens = cast(int, getattr(output_layer, "own_tokens", weight.size(0)))  # see posttrain.models.padding
    labels = labels.index_select(1, context)
    group = cast("dist.ProcessGroup | None", getattr(output_layer, "tp_group", None))
    if group is not None and group.size() > 1:
        hidden_states = whole_hidden(hidden_states, config.sequence_parallel)
        hidden = hidden_states.index_select(0, context)
        first = group.rank() * weight.size(0)
        own_labels = labels[0] - first
        losses = DividedLinearCrossEntropy.apply(hidden.squeeze(1), weight, bias, own_labels, group, softcap, tokens)
        return cast(torch.Tensor, losses)[None]
    hidden = hidden_states.index_select(0, context)
    if hidden.is_cuda and not weight.requires_grad and bias is None:
        run_pre_hooks(output_layer)
        return FrozenLinearCrossEntropy.apply(hidden.squeeze(1), weight, labels[0], softcap, tokens)[None]
    logits, _ = output_layer(hidden, weight=output_weight)
    return compute_language_model_loss(labels, logits)


def token_logits(
    *,
    hidden_states: torch.Tensor,
    output_layer: torch.nn.Module,
    output_weight: torch.Tensor | None,
    context: int,
    config: "TransformerConfig",
    **unused: object,
) -> torch.Tensor:
    """Return the logits of one position; an output processor of Megatron's GPTModel under tensor parallelism.

    Args:
        hidden_states: [t, 1, h] of the last layer, [t/n, 1, h] with sequence parallelism.
        output_layer: the model's vocabulary projection.
        output_weight: [v/n, h], the embedding where it is shared, else None.
        context: the position.
        config: the model's configuration.

    Returns:
        [v], not soft-capped; the lowest number for what is no token.
    """
    from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region

    weight = cast(torch.Tensor, output_layer.weight if output_weight is None else output_weight)
    bias = cast("torch.Tensor | None", getattr(output_layer, "bias", None))
    hidden = whole_hidden(hidden_states, config.sequence_parallel)[context, 0]
    logits = torch.nn.functional.linear(hidden, weight, bias)
    tokens = cast(int, getattr(output_layer, "own_tokens", weight.size(0)))  # see posttrain.models.padding
    logits[tokens:] = torch.finfo(logits.dtype).min
    return cast(torch.Tensor, gather_from_tensor_model_parallel_region(logits))


def run_pre_hooks(module: torch.nn.Module) -> None:
    """Do what comes before a module's forward pass: Megatron-FSDP gathers there the weight that is read without it."""
    for number, hook in module._forward_pre_hooks.items():
        if number in module._forward_pre_hooks_with_kwargs:
            hook(module, (), {})
        else:
            hook(module, ())


type Context = Any  # of torch.autograd.Function, which takes whatever attributes it is given


class FrozenLinearCrossEntropy(torch.autograd.Function):
    """cross_entropy(cap(hidden @ weight.T), labels) per row, with the gradient of `hidden` alone."""

    @staticmethod
    def forward(
        ctx: Context,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        softcap: float | None,
        tokens: int,
    ) -> torch.Tensor:
        """Return losses float32[k].

        Args:
            ctx: torch's.
            hidden: [k, h].
            weight: [v, h].
            labels: int64[k].
            softcap: what logits are squashed to.
            tokens: rows of the weight that are tokens'.
        """
        from posttrain.ops.triton_kernels import cross_entropy_

        losses = torch.empty(hidden.size(0), dtype=torch.float32, device=hidden.device)
        gradient: torch.Tensor | None = None
        if ctx.needs_input_grad[0]:
            gradient = torch.empty_like(hidden)
        for start in range(0, hidden.size(0), LOGIT_ROWS):
            rows = slice(start, start + LOGIT_ROWS)
            logits = hidden[rows] @ weight.t()
            # Afterwards the logits hold their own gradient.
            cross_entropy_(logits[:, :tokens], labels[rows], losses[rows], gradient is not None, softcap)
            if gradient is not None:
                logits[:, tokens:].zero_()
                torch.mm(logits, weight, out=gradient[rows])
            del logits  # before the next chunk's are made
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    def backward(ctx: Context, upstream: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        """Scale each row with its own upstream gradient."""
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[:, None].to(gradient.dtype), None, None, None, None


class DividedLinearCrossEntropy(torch.autograd.Function):
    """FrozenLinearCrossEntropy of processes with a part of the vocabulary each; the gradient is a part of a sum."""

    @staticmethod
    def forward(
        ctx: Context,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        group: dist.ProcessGroup,
        softcap: float | None,
        tokens: int,
    ) -> torch.Tensor:
        """Return losses float32[k], of the whole vocabulary.

        Args:
            ctx: torch's.
            hidden: [k, h], the same on all processes.
            weight: [v/n, h].
            bias: [v/n], if there is one.
            labels: int64[k], counted from the first token of this part.
            group: the processes.
            softcap: what logits are squashed to.
            tokens: rows of the weight that are tokens'.
        """
        losses = torch.empty(hidden.size(0), dtype=torch.float32, device=hidden.device)
        gradient: torch.Tensor | None = None
        if ctx.needs_input_grad[0]:
            gradient = torch.empty_like(hidden)
        for start in range(0, hidden.size(0), LOGIT_ROWS):
            rows = slice(start, start + LOGIT_ROWS)
            logits = hidden[rows] @ weight.t()
            if bias is not None:
                logits += bias
            own = logits[:, :tokens]
            largest, total, target = log_sum_parts(own, labels[rows], softcap)
            most = largest.clone()
            dist.all_reduce(most, dist.ReduceOp.MAX, group=group)
            sums = torch.stack([total * (largest - most).exp(), target])
            dist.all_reduce(sums, group=group)
            log_sums = most + sums[0].log()
            losses[rows] = log_sums - sums[1]
            if gradient is not None:
                log_sum_gradient_(own, labels[rows], log_sums, softcap)
                logits[:, tokens:].zero_()
                torch.mm(logits, weight, out=gradient[rows])
            del logits  # before the next chunk's are made
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    def backward(ctx: Context, upstream: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None, None, None]:
        """Scale each row with its own upstream gradient."""
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[:, None].to(gradient.dtype), None, None, None, None, None, None


def whole_hidden(hidden: torch.Tensor, sequence_parallel: bool) -> torch.Tensor:
    """All tokens [t, 1, h] on each process, whose gradients are summed."""
    from megatron.core.tensor_parallel import mappings

    if sequence_parallel:
        return mappings.gather_from_sequence_parallel_region(hidden)
    return mappings.copy_to_tensor_model_parallel_region(hidden)


def log_sum_parts(
    logits: torch.Tensor, labels: torch.Tensor, softcap: float | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What a part of the vocabulary contributes, which may have no token; see posttrain.ops.triton_kernels."""
    if not logits.size(1):
        nothing = torch.zeros(logits.size(0), dtype=torch.float32, device=logits.device)
        return torch.full_like(nothing, -torch.inf), nothing, nothing
    if logits.is_cuda:
        from posttrain.ops import triton_kernels

        return triton_kernels.log_sum_parts(logits, labels, softcap)
    values = capped(logits.float(), softcap)
    largest = values.amax(1)
    here = (labels >= 0) & (labels < values.size(1))
    target = values.gather(1, labels.where(here, 0)[:, None])[:, 0]
    return largest, (values - largest[:, None]).exp().sum(1), target.where(here, 0.0)


def log_sum_gradient_(
    logits: torch.Tensor, labels: torch.Tensor, log_sums: torch.Tensor, softcap: float | None
) -> None:
    """Overwrite a part's logits with their gradient; see posttrain.ops.triton_kernels."""
    if not logits.size(1):
        return
    if logits.is_cuda:
        from posttrain.ops import triton_kernels

        triton_kernels.log_sum_gradient_(logits, labels, log_sums, softcap)
        return
    values = capped(logits.float(), softcap)
    gradient = (values - log_sums[:, None]).exp()
    column = torch.arange(logits.size(1), device=logits.device)
    gradient -= (column == labels[:, None]).float()
    if softcap is not None:
        gradient *= 1 - (values / softcap).square()
    logits.copy_(gradient)


def capped(values: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """softcap tanh(values / softcap)."""
    if softcap is None:
        return values
    return softcap * torch.tanh(values / softcap)
