"""What to say when a GPU's memory is full: what has it, and which settings would help most, by how much."""

from collections.abc import Mapping
from itertools import chain
from typing import TYPE_CHECKING

import torch

from posttrain.plan.advice import Change, changes, cheapest
from posttrain.plan.memory import GIB, estimate_memory
from posttrain.spec.run_spec import RunSpec
from posttrain.utils.gpus import Gpu

if TYPE_CHECKING:
    from megatron.core.optimizer import MegatronOptimizer

MOST = 3  # changes that are shown


def message(
    error: str, stats: Mapping[str, int], total: int, held: Mapping[str, int], setting: RunSpec | None, gpu: Gpu
) -> str:
    """The text.

    Args:
        error: what torch says.
        stats: torch.cuda.memory_stats().
        total: bytes that the GPU has.
        held: bytes of the weights, gradients and optimizer state that are on the GPU.
        setting: the run; None: its sizes are not known.
        gpu: it ran on.
    """
    allocated, reserved = stats.get("allocated_bytes.all.current", 0), stats.get("reserved_bytes.all.current", 0)
    known = {name: size for name, size in held.items() if size}
    rest = max(0, allocated - sum(known.values()))
    parts = ", ".join(f"{name} {_gib(size)}" for name, size in {**known, "activations and buffers": rest}.items())
    lines = [
        f"the GPU's memory is full: {' '.join(error.split()).split('. GPU')[0]}",
        f"  allocated {_gib(allocated)} of {_gib(total)} ({parts}); most so far "
        f"{_gib(stats.get('allocated_bytes.all.peak', allocated))}, held free in blocks {_gib(reserved - allocated)}",
    ]
    if setting is None:
        return "\n".join([*lines, "  lower trainer.micro_batch_size or trainer.seq_length, or trainer.recompute=full"])
    now = estimate_memory(setting)
    chosen = best(changes(setting, gpu), now.needed, gpu)
    if chosen:
        lines.append(f"by estimate the run needs {_gib(now.needed)} on each GPU; what would help most:")
    for change in chosen:
        overrides = " ".join(change.overrides)
        lines.append(f"  {overrides:45} {_effect(change, now.needed, gpu)}")
    if not any(change.fits(gpu) for change in chosen):
        together = cheapest(setting, gpu)
        if together:
            overrides = " ".join(together.overrides)
            needed = _gib(together.memory.needed)
            lines.append(f"none of these alone fits; together: {overrides} ({needed})")
    lines.append("python -m posttrain.plan with the same overrides reports this before a run")
    return "\n".join(lines)


def best(possible: list[Change], needed: float, gpu: Gpu) -> list[Change]:
    """The changes of different settings that make the run fit, the cheapest first, then those that save most."""
    fitting: list[Change] = []
    others: list[Change] = []
    for change in possible:
        if change.memory.needed < 0.99 * needed:
            kind = fitting if change.fits(gpu) else others
            kind.append(change)
    others.sort(key=lambda change: change.memory.needed)
    found: dict[str, Change] = {}
    for change in [*fitting, *others]:
        found.setdefault(change.overrides[0].partition("=")[0], change)
    return list(found.values())[:MOST]


def describe(
    spec: RunSpec, error: Exception, chunks: list[torch.nn.Module], optimizer: "MegatronOptimizer | None"
) -> str:
    """`message` for a run whose allocation failed in this process.

    Args:
        spec: of the run.
        error: torch's.
        chunks, optimizer: of the live model; empty and None before there is one.
    """
    total = torch.cuda.mem_get_info()[1]
    setting = spec if spec.shape is not None else None
    gpu = Gpu(torch.cuda.get_device_name(), None, total / GIB, capability=torch.cuda.get_device_capability())
    return message(str(error), torch.cuda.memory_stats(), total, held(chunks, optimizer), setting, gpu)


def held(chunks: list[torch.nn.Module], optimizer: "MegatronOptimizer | None") -> dict[str, int]:
    """Bytes on the GPU of the weights, their gradients and the optimizer's state; each storage once."""
    seen: set[int] = set()

    def size(tensor: object) -> int:
        if not isinstance(tensor, torch.Tensor) or not tensor.is_cuda:
            return 0
        storage = tensor.untyped_storage()
        if storage.data_ptr() in seen:
            return 0
        seen.add(storage.data_ptr())
        return storage.nbytes()

    sizes = {"weights": 0, "gradients": 0, "optimizer": 0}
    parameters = list(chain.from_iterable(map(torch.nn.Module.parameters, chunks)))
    for parameter in parameters:
        sizes["weights"] += size(parameter.data)
    for parameter in parameters:
        sizes["gradients"] += size(getattr(parameter, "main_grad", None)) + size(parameter.grad)
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = getattr(part, "optimizer", None)
        if inner is None:
            continue
        for values in inner.state.values():
            sizes["optimizer"] += sum(map(size, values.values()))
        for group in inner.param_groups:
            sizes["optimizer"] += sum(map(size, group["params"]))
    return sizes


def _effect(change: Change, needed: float, gpu: Gpu) -> str:
    effect = f"{_gib(needed)} -> {_gib(change.memory.needed)}, "
    effect += "fits" if change.fits(gpu) else "does not fit by itself"
    if abs(change.slower - 1) > 0.005:
        effect += f", {change.slower:.2f} x the time"
    if change.kind == "gpus":
        effect += f", on {change.setting.world} GPUs"
    elif change.kind == "data":
        effect += ", shorter sequences"
    elif change.kind == "result":
        effect += ", different training"
    return effect


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB"
