"""Check, before anything is loaded, that peft settings match the adapter that a run continues from. No torch here."""

from collections.abc import Iterable
from pathlib import Path
from shlex import quote

from posttrain.errors import UserError
from posttrain.models.families import families
from posttrain.models.families.family import PARTS
from posttrain.models.hf_adapter import Adapter
from posttrain.peft.adapters import DoRA, LoRA, hf_names, resolve


def check(adapter: Adapter, ours: LoRA, directory: Path) -> None:
    """Raise a UserError unless kind, rank, scale and modules of an adapter (see `read_adapter`) are those of `ours`."""
    config, pairs, tensors = adapter
    dora = isinstance(ours, DoRA)
    if bool(config.get("use_dora")) != dora:
        kind, group = ("LoRA", "lora") if dora else ("DoRA", "dora")
        raise UserError(f"{directory}: is {kind}; choose peft={group}")
    ranks = {module: tensors[pair.tensors["a"]].shape[0] for module, pair in pairs.items()}
    first = next(iter(pairs), "")
    for module, pair in pairs.items():
        if ranks[module] != ranks[first] or pair.scale != pairs[first].scale:
            raise UserError(
                f"{directory}: has another rank or alpha on {module} than on {first}, and one peft.rank and peft.alpha "
                "are for all; merge it, and continue from what that writes: "
                f"python -m posttrain.convert merge {quote(str(directory))} DIR"
            )
    for module, pair in pairs.items():
        rank = ranks[module]
        if rank != ours.rank or abs(pair.scale - ours.effective_alpha / ours.rank) > 1e-6 * pair.scale:
            divisor = rank**0.5 if ours.rslora else rank
            alpha = pair.scale * divisor
            raise UserError(f"{directory}: has rank {rank} on {module}; add peft.rank={rank} peft.alpha={alpha:g}")
    canonical, names = resolve(ours.target_modules)
    adapted = components(pairs)
    if adapted is None or any("." in name or "*" in name for name in names):
        return  # experts, patterns: compared tensor by tensor when they are loaded
    if not canonical:
        adapted = {PARTS.get(name, name) for name in adapted}
    if adapted != set(names):
        listed = sorted({module.rpartition(".")[2] for module in pairs})
        raise UserError(f"{directory}: was trained on other modules; set peft.target_modules=[{','.join(listed)}]")


def components(modules: Iterable[str]) -> set[str] | None:
    """Megatron's names of an adapter's modules; None where one of them has none here."""
    # A family may call two projections by one name: what they belong to tells them apart.
    with_parent: dict[str, str | None] = {}
    for family in families():
        with_parent |= {matrix.name: matrix.component for matrix in family.adapted}
    parts, whole = hf_names()
    by_name = with_parent | whole | parts
    adapted = set()
    for module in modules:
        last = module.rpartition(".")[2]
        component = by_name.get(".".join(module.split(".")[-2:])) or by_name.get(last)
        if component is None or ".experts." in module:
            return None
        adapted.add(component)
    return adapted
