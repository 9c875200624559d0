"""A plan as numbers: what `python -m posttrain.plan --json` prints, and the tables are made of."""

import logging
from dataclasses import replace
from typing import Any

from omegaconf import DictConfig

from posttrain.errors import UserError
from posttrain.plan import advice
from posttrain.plan.gpus import Gpu
from posttrain.plan.memory import GIB, Memory, memory
from posttrain.plan.rows import Rows, count, of_bins
from posttrain.plan.setting import Setting
from posttrain.plan.speed import speed

log = logging.getLogger(__name__)


def report(cfg: DictConfig, world: int, gpu: Gpu, counted: bool = True) -> dict[str, Any]:
    """The plan of a checked configuration.

    Args:
        world: processes over all machines.
        gpu: what each of them runs on.
        counted: read the data.

    Returns:
        JSON-able; memory in GiB per GPU, times in seconds.
    """
    setting, rows, reason = Setting.of(cfg, world), None, "plan.count=false"
    if counted:
        try:
            rows = count(cfg)
        except UserError as error:
            reason = str(error)
    if rows:
        setting = with_rows(setting, rows)
    found = memory(setting)
    steps, tokens = _steps(cfg, setting, rows)
    expected = speed(setting, gpu, tokens)
    fits = found.needed <= gpu.memory_gib * GIB
    best = None if fits else advice.cheapest(setting, gpu)
    shape, adapters = setting.shape, setting.adapters
    return {
        "model": str(cfg.model.path),
        "parameters": {
            "total": shape.parameters + (adapters.parameters if adapters else 0),
            "model": shape.parameters,
            "trainable": adapters.parameters if adapters else shape.parameters,
        },
        "gpu": {
            "name": gpu.name, "count": world, "memory_gib": round(gpu.memory_gib, 1), "bf16_tflops": gpu.tflops,
        },
        "layout": {
            "tensor": setting.tensor, "pipeline": setting.pipeline, "context": setting.context,
            "expert": setting.expert, "data": setting.data_parallel,
        },
        "memory_gib": _gib(found),
        "fits": fits,
        "changes": [_change(change, gpu) for change in advice.changes(setting, gpu)],
        "cheapest_change": _change(best, gpu) if best else None,
        "data": vars(rows) if rows else {"not_counted": reason},
        "steps": steps,
        "tokens_per_step": round(tokens),
        "tokens": round(tokens * steps) if steps else None,
        "trained_share_assumed": None if rows else setting.trained,
        "speed": {
            "mfu": expected.mfu and round(expected.mfu, 3),
            "tokens_per_second": expected.tokens_per_second and round(expected.tokens_per_second),
            "step_s": expected.step_s and round(expected.step_s, 4),
            "total_s": expected.step_s and steps and round(expected.step_s * steps),
            "bound": expected.bound,
        },
    }  # fmt: skip


def planned_peak(trainer: Any) -> float | None:
    """GiB that a run is expected to allocate at most, with the rows that it has; None where that isn't known.

    Args:
        trainer: a posttrain.trainer.Trainer whose data is built.
    """
    if trainer.platform.device == "cpu":
        return None
    try:
        setting = Setting.of(trainer.config, trainer.world, trainer.platform.transformer_engine)
        return memory(with_rows(setting, of_bins(trainer.splits.train, trainer.config))).peak / GIB
    except Exception as error:  # whatever is wrong with an estimate, the run goes on
        log.warning("no plan of the memory: %s: %s", type(error).__name__, error)
        return None


def with_rows(setting: Setting, rows: Rows) -> Setting:
    """The setting with what was counted in the data."""
    length = rows.most_tokens / setting.micro_batch
    # In a CUDA graph all micro-batches have room for as many trained tokens as the fullest rows have.
    most = setting.micro_batch * rows.row_trained if setting.captured else rows.most_trained
    trained = min(1.0, most / rows.most_tokens)
    return replace(setting, length=length, trained=trained, squares=rows.squares, sequences=rows.sequences,
                   longest=rows.longest)  # fmt: skip


def _steps(cfg: DictConfig, setting: Setting, rows: Rows | None) -> tuple[int | None, float]:
    """Optimizer steps, None where that depends on data that was not counted; tokens of one step."""
    t = cfg.trainer
    full = t.global_batch_size * t.seq_length
    tokens = full if rows is None else min(full, rows.tokens / rows.rows * t.global_batch_size)
    if t.max_steps is not None:
        return t.max_steps, tokens
    if rows is None:
        return None, tokens
    return max(1, -int(-(t.epochs or 1.0) * rows.rows // t.global_batch_size)), tokens


def _gib(found: Memory) -> dict[str, Any]:
    rounded = {name: round(size / GIB, 3) for name, size in found.parts.items()}
    detail = {part: {name: round(size / GIB, 4) for name, size in terms.items()}
              for part, terms in found.detail.items()}  # fmt: skip
    return {"parts": rounded, "peak": round(found.peak / GIB, 2), "outside": round(found.outside / GIB, 2),
            "needed": round(found.needed / GIB, 2), "detail": detail}  # fmt: skip


def _change(change: advice.Change, gpu: Gpu) -> dict[str, Any]:
    return {
        "words": list(change.words), "kind": change.what, "gpus": change.setting.world,
        "needed_gib": round(change.memory.needed / GIB, 2), "fits": change.fits(gpu), "time": round(change.slower, 2),
    }  # fmt: skip
