"""Do a run's peft settings fit the adapter that it continues from? Known before anything is loaded; no torch here."""

from collections.abc import Iterable
from pathlib import Path

from posttrain.errors import UserError
from posttrain.models.families import families
from posttrain.models.families.family import PARTS
from posttrain.peft.adapters import DoRA, LoRA, hf_names, resolve


def check(adapter: tuple, ours: LoRA, directory: Path) -> None:
    """Raise a UserError unless kind, rank, scale and modules of an adapter (see `read_adapter`) are those of `ours`."""
    config, pairs, tensors = adapter
    dora = isinstance(ours, DoRA)
    if bool(config.get("use_dora")) != dora:
        raise UserError(f"{directory}: is {'LoRA' if dora else 'DoRA'}; choose peft={'lora' if dora else 'dora'}")
    for module, pair in pairs.items():
        rank = tensors[pair.tensors["a"]].shape[0]
        if rank != ours.rank or abs(pair.scale - ours.effective_alpha / ours.rank) > 1e-6 * pair.scale:
            alpha = pair.scale * (rank**0.5 if ours.rslora else rank)
            raise UserError(f"{directory}: has rank {rank} on {module}; add peft.rank={rank} peft.alpha={alpha:g}")
    canonical, names = resolve(ours.target_modules)
    held = components(pairs)
    if held is None or any("." in name or "*" in name for name in names):
        return  # experts, patterns: compared tensor by tensor when they are loaded
    if (held if canonical else {PARTS.get(name, name) for name in held}) != set(names):
        listed = sorted({module.rpartition(".")[2] for module in pairs})
        raise UserError(f"{directory}: was trained on other modules; set peft.target_modules=[{','.join(listed)}]")


def components(modules: Iterable[str]) -> set[str] | None:
    """Megatron's names of an adapter's modules; None where one of them has none here."""
    # A family may call two projections by one name: what they belong to tells them apart.
    with_parent = {matrix.name: matrix.component for family in families() for matrix in family.adapted}
    parts, whole = hf_names()
    by_name = with_parent | whole | parts
    found = set()
    for module in modules:
        last = module.rpartition(".")[2]
        component = by_name.get(".".join(module.split(".")[-2:])) or by_name.get(last)
        if component is None or ".experts." in module:
            return None
        found.add(component)
    return found
