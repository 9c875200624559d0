"""Build a plan as numbers, for `python -m posttrain.plan --json` and the tables."""

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from posttrain.errors import UserError
from posttrain.plan import advice, layouts
from posttrain.plan.data_stats import DataStats, Kept, estimate_data
from posttrain.plan.memory import GIB, Memory, estimate_memory, host_room
from posttrain.plan.speed import Speed, estimate_speed
from posttrain.plan.typed_settings import TypedSettings
from posttrain.spec.epochs import Epoch
from posttrain.spec.megatron_keys import uncounted_keys
from posttrain.spec.resolve import resolve_spec
from posttrain.spec.run_spec import RunSpec
from posttrain.spec.schedule import schedule_of
from posttrain.utils.gpus import Gpu

if TYPE_CHECKING:
    from posttrain.data.dataset import PackedDataset

log = logging.getLogger(__name__)


MOST_REPLANNED = 4  # changes that are planned in full to find one that fits

Plan = dict[str, Any]
Replan = Callable[[advice.Change], Plan | None]


def build_plan(
    cfg: DictConfig,
    world: int,
    gpu: Gpu,
    read_data: bool = True,
    replan: Replan | None = None,
    typed: TypedSettings = advice.PLAIN,
    kept: Kept | None = None,
) -> Plan:
    """Return the plan of a checked configuration.

    Args:
        cfg: the configuration.
        world: processes over all machines.
        gpu: what each of them runs on.
        read_data: count the data.
        replan: plans a change's overrides in full, None where they can't be; None: changes are estimated.
        typed: how the run was asked for.
        kept: see `estimate_data`.

    Returns:
        JSON-able; memory in GiB per GPU, times in seconds.
    """
    setting = resolve_spec(cfg, world)
    stats = None
    data: dict[str, Any] = {"not_counted": "plan.read_data=false"}
    if read_data:
        try:
            stats = estimate_data(cfg, setting.conversation_multiple, kept)
            setting = with_data(setting, stats)
            data = vars(stats)
        except UserError as error:
            data["not_counted"] = str(error)
    memory = estimate_memory(setting)
    steps = setting.steps(stats.rows if stats else None)
    epoch = setting.epoch(stats.rows) if stats else None
    row = float(cfg.trainer.seq_length)
    batch = setting.global_batch
    if stats:
        row = min(row, stats.tokens / stats.rows)
        batch = min(batch, stats.rows)
    tokens = row * batch
    total = None
    if steps:
        total = round(row * (epoch.trained(steps) if epoch else steps * batch))
    fits = memory.fits(gpu)
    speed = _speed(estimate_speed(setting, gpu, tokens), total)
    others = layouts.fitting(cfg, setting, gpu, tokens, typed)
    # What would choose again beside a change makes another run of it than is estimated.
    in_full = replan if typed.chooses else None
    single = list(_changes(advice.changes(setting, gpu, 1, tokens, typed), gpu, speed, in_full))
    best = None
    if not fits:
        found = advice.fitting(setting, gpu, tokens, typed)
        best = _cheapest(_changes(found[:MOST_REPLANNED], gpu, speed, replan))
    if best is not None:
        for change in single:
            if change["overrides"] == best["overrides"]:
                change.update(best)
    return {
        "model": str(cfg.model.path),
        "parameters": _parameters(setting),
        "gpu": {
            "name": gpu.name,
            "count": world,
            "memory_gib": round(gpu.memory_gib, 1),
            "bf16_tflops": gpu.tflops,
            "host_room_gib": _host_room(gpu),
        },
        "layout": {
            "tensor": setting.tensor,
            "pipeline": setting.pipeline,
            "context": setting.context,
            "expert": setting.expert,
            "data": setting.data_parallel,
        },
        "stage_layers": setting.stages,
        "decisions": {name: str(decision) for name, decision in setting.decisions().items()},
        "memory_gib": _in_gib(memory),
        "settings_not_counted": uncounted_keys(cfg.trainer.megatron),
        "fits": fits,
        "layouts": [_layout(layout) for layout in others],
        "changes": single,
        "cheapest_change": best,
        "data": data,
        "steps": steps,
        "epoch": _epoch(epoch, steps),
        "learning_rate": _learning_rate(cfg, steps),
        "tokens_per_step": round(tokens),
        "tokens": total,
        "supervised_share_assumed": None if stats else setting.supervised_share,
        "speed": speed,
    }


def planned_peak(spec: RunSpec, cfg: DictConfig, rows: "PackedDataset") -> float | None:
    """Return the GiB that a run on GPUs is expected to allocate at most, or None where that isn't known.

    Args:
        spec: the run's.
        cfg: its frozen configuration.
        rows: its training data, packed.
    """
    if spec.shape is None:
        return None
    try:
        stats = DataStats.from_dataset(rows, cfg)
        return estimate_memory(with_data(spec, stats)).peak / GIB
    except Exception as error:  # whatever is wrong with an estimate, the run continues
        log.warning("no plan of the memory: %s: %s", type(error).__name__, error)
        return None


def with_data(setting: RunSpec, stats: DataStats) -> RunSpec:
    """Return the setting with what was counted in the data."""
    most_supervised = stats.most_supervised
    if setting.cuda_graph:
        # In a CUDA graph every micro-batch has room for as many supervised tokens as the fullest
        # sequences have.
        most_supervised = setting.micro_batch * stats.row_supervised
    return replace(
        setting,
        length=stats.most_tokens / setting.micro_batch,
        supervised_share=min(1.0, most_supervised / stats.most_tokens),
        squares=stats.squares,
        sequences=stats.sequences,
        longest=stats.longest,
    )


def _epoch(epoch: Epoch | None, steps: int | None) -> dict[str, Any] | None:
    """The steps of an epoch, and how many epochs the run is; None where the data was not counted."""
    if epoch is None or steps is None:
        return None
    return {
        "steps": epoch.steps,
        "last_batch": epoch.last_batch,
        "passes": round(epoch.trained(steps) / epoch.rows, 4),
        "text": epoch.describe(),
    }


def _learning_rate(cfg: DictConfig, steps: int | None) -> str | None:
    """The schedule in a line, with what of it can't be as asked; None where the run's steps are not known."""
    if steps is None:
        return None
    schedule = schedule_of(cfg, steps)
    return "; ".join([schedule.describe(), *schedule.notes])


def _parameters(setting: RunSpec) -> dict[str, int]:
    model = setting.known_shape.parameters
    if setting.adapters is None:
        return {"total": model, "model": model, "trainable": model}
    trainable = setting.adapters.parameters
    return {"total": model + trainable, "model": model, "trainable": trainable}


def _in_gib(memory: Memory) -> dict[str, Any]:
    parts = {name: round(size / GIB, 3) for name, size in memory.parts.items()}
    detail = {}
    for part, terms in memory.detail.items():
        detail[part] = {name: round(size / GIB, 4) for name, size in terms.items()}
    return {
        "parts": parts,
        "peak": round(memory.peak / GIB, 2),
        "outside": round(memory.outside / GIB, 2),
        "needed": round(memory.needed / GIB, 2),
        "host": round(memory.host / GIB, 2),
        "detail": detail,
    }


def _speed(speed: Speed, tokens: int | None) -> dict[str, Any]:
    """Speeds and times, None where the GPU's rate is not known."""
    rounded: dict[str, Any] = dict.fromkeys(("mfu", "tokens_per_second", "step_s", "total_s"))
    if speed.step_s and speed.mfu and speed.tokens_per_second:
        rounded["mfu"] = round(speed.mfu, 3)
        rounded["tokens_per_second"] = round(speed.tokens_per_second)
        rounded["step_s"] = round(speed.step_s, 4)
        if tokens:
            rounded["total_s"] = round(tokens / speed.tokens_per_second)
    rounded["bound"] = speed.bound
    return rounded


def _changes(
    changes: list[advice.Change], gpu: Gpu, before: dict[str, Any], replan: Replan | None
) -> Iterator[dict[str, Any]]:
    """Yield changes, with what their plans say where they are planned in full; those that can't be are left out.

    Args:
        changes: as estimated.
        gpu: what the run is on.
        before: the speed without a change.
        replan: see `build_plan`; None: they are estimated.
    """
    for change in changes:
        entry = _change(change, gpu)
        if replan is None:
            yield entry
            continue
        planned = replan(change)
        if planned is None:
            continue
        entry["fits"] = planned["fits"]
        entry["gpus"] = planned["gpu"]["count"]
        entry["needed_gib"] = planned["memory_gib"]["needed"]
        entry["host_gib"] = round(planned["memory_gib"]["host"], 1)
        after = planned["speed"]
        if before["tokens_per_second"] and after["tokens_per_second"]:
            entry["time"] = round(before["tokens_per_second"] / after["tokens_per_second"], 2)
        yield entry


def _cheapest(changes: Iterable[dict[str, Any]]) -> dict[str, Any] | None:
    """The first of changes that fits; None: there is none."""
    return next((change for change in changes if change["fits"]), None)


def _host_room(gpu: Gpu) -> float | None:
    room = host_room(gpu)
    if room is None:
        return None
    return round(room, 2)


def _layout(layout: layouts.Layout) -> dict[str, Any]:
    """A way in which the run fits on these GPUs."""
    return {
        "overrides": list(layout.overrides),
        "eight_bit_weights": layout.eight_bit,
        "needed_gib": round(layout.memory.needed / GIB, 2),
        "host_gib": round(layout.memory.host / GIB, 1),
        "step_s": None if layout.step_s is None else round(layout.step_s, 4),
    }


def _change(change: advice.Change, gpu: Gpu) -> dict[str, Any]:
    return {
        "overrides": list(change.overrides),
        "kind": change.kind,
        "gpus": change.setting.world,
        "needed_gib": round(change.memory.needed / GIB, 2),
        "host_gib": round(change.memory.host / GIB, 1),
        "fits": change.fits(gpu),
        "time": round(change.slower, 2),
    }
