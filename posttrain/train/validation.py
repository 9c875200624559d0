"""Loss on the validation split: Megatron-Bridge's evaluation over this project's rows."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from megatron.bridge.training.callbacks import CallbackContext
from megatron.bridge.training.eval import evaluate
from megatron.bridge.training.train import disable_forward_pre_hook, enable_forward_pre_hook
from megatron.core import parallel_state
from megatron.core.rerun_state_machine import RerunDataIterator
from megatron.core.utils import get_model_config

from posttrain.train.run_batches import RunBatches


def from_last_stage(value: torch.Tensor | None) -> float:
    """A scalar that only the last pipeline stage has, on every stage, as a float."""
    if parallel_state.get_pipeline_model_parallel_world_size() == 1:
        assert value is not None
        return float(value)
    tensor = torch.zeros((), device="cuda")
    if value is not None:
        tensor = value.detach().float().reshape(())
    last = parallel_state.get_pipeline_model_parallel_last_rank()
    torch.distributed.broadcast(tensor, last, group=parallel_state.get_pipeline_model_parallel_group())
    return float(tensor)


@contextmanager
def gathered(context: CallbackContext) -> Iterator[None]:
    """Whole parameters on every rank, and no gathering of them in a forward pass, for as long as it lasts."""
    model = context.model
    overlapped = any(getattr(chunk, "remove_forward_pre_hook_handles", None) for chunk in model)
    if overlapped:
        disable_forward_pre_hook(model, optimizer=context.optimizer)
    try:
        yield
    finally:
        if overlapped:
            enable_forward_pre_hook(model)


def validate(context: CallbackContext, batches: RunBatches, metrics: Mapping[str, str]) -> dict[str, float]:
    """The objective's metrics over the validation split, by column; the same on every rank. A collective call.

    Args:
        context: of the training loop.
        batches: of the run.
        metrics: names in the forward step's report -> columns.
    """
    model, cfg = context.model, context.state.cfg
    # A graph for the few steps of a validation would hold its memory for the whole run.
    graph = cfg.model.cuda_graph_impl
    cfg.model.cuda_graph_impl = "none"
    try:
        with gathered(context):
            rows = RerunDataIterator(batches.validation())
            report, _, _ = evaluate(context.state, batches.forward_step, rows, model, None, get_model_config(model[0]))
    finally:
        cfg.model.cuda_graph_impl = graph
    values = [from_last_stage(report.get(name)) for name in metrics]
    if torch.distributed.get_world_size() > 1:  # ranks that compute the same may round differently
        tensor = torch.tensor(values, dtype=torch.float64, device="cuda")
        torch.distributed.broadcast(tensor, src=0)
        values = tensor.tolist()
    return dict(zip(metrics.values(), values, strict=True))
