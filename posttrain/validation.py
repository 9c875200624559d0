"""Loss on the validation split: Megatron-Bridge's evaluation over this project's rows."""

from typing import Any

import torch
from megatron.bridge.data.samplers import build_pretraining_data_loader
from megatron.bridge.training.callbacks import CallbackContext
from megatron.bridge.training.eval import evaluate
from megatron.bridge.training.train import disable_forward_pre_hook, enable_forward_pre_hook
from megatron.core import parallel_state
from megatron.core.rerun_state_machine import RerunDataIterator
from megatron.core.utils import get_model_config


def from_last_stage(value: torch.Tensor | None) -> float:
    """A scalar that only the last pipeline stage has, on every stage, as a float."""
    if parallel_state.get_pipeline_model_parallel_world_size() == 1:
        return float(value)
    tensor = torch.zeros((), device="cuda") if value is None else value.detach().float().reshape(())
    torch.distributed.broadcast(
        tensor, parallel_state.get_pipeline_model_parallel_last_rank(),
        group=parallel_state.get_pipeline_model_parallel_group(),
    )  # fmt: skip
    return float(tensor)


class Validator:
    """Evaluates the model as it is.

    Args:
        trainer: the run's trainer.
        step: the forward step.
    """

    def __init__(self, trainer: Any, step: Any) -> None:
        self.trainer, self.step = trainer, step

    def run(self, context: CallbackContext) -> float:
        """Mean loss per trained token over the validation split; the same on every rank."""
        counts, totals = self.step.counts, list(self.step.counts.totals)
        model = context.model
        overlapped = any(getattr(chunk, "remove_forward_pre_hook_handles", None) for chunk in model)
        if overlapped:
            disable_forward_pre_hook(model, optimizer=context.optimizer)
        losses, _, _ = evaluate(
            context.state,
            self.step,
            RerunDataIterator(iter(self.loader(context))),
            model,
            None,
            get_model_config(model[0]),
        )
        if overlapped:
            enable_forward_pre_hook(model)
        counts.totals = totals
        return from_last_stage(losses.get("lm loss"))

    def loader(self, context: CallbackContext) -> Any:
        """A fresh loader over all validation rows, this process's share of each batch."""
        cfg = context.state.cfg
        rows = cfg.dataset.validation()
        return build_pretraining_data_loader(
            rows, 0, "single", cfg.validation.eval_micro_batch_size, 0, True, collate_fn=rows.collate_fn,
            data_parallel_rank=parallel_state.get_data_parallel_rank(),
            data_parallel_size=parallel_state.get_data_parallel_world_size(),
            global_batch_size=cfg.validation.eval_global_batch_size, pin_memory=False, persistent_workers=False,
        )  # fmt: skip
