"""How a run may be divided over its processes: for `parallelism=auto`, and for what fits on the GPUs that there are."""

import bisect
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

from omegaconf import DictConfig, OmegaConf

from posttrain.config import yaml_file
from posttrain.config.policy import SHIPPED
from posttrain.errors import UserError
from posttrain.plan.memory import GIB, Memory, estimate_memory
from posttrain.plan.speed import estimate_speed
from posttrain.plan.typed_settings import DIVIDED_STATE, TypedSavings, TypedSettings
from posttrain.spec import checks, model_checks
from posttrain.spec.parallel_sizes import KEYS
from posttrain.spec.resolve import read_recompute
from posttrain.spec.run_spec import RunSpec
from posttrain.utils.gpus import Gpu

SIZES = (1, 2, 4, 8, 16)
RECOMPUTE = ("none", "full")
LARGER = (2, 4, 8)  # times the micro-batch that was asked for
MOST_SHOWN = 4  # with weights alike, beside what was asked for
PLAIN = TypedSettings()
HEADROOM = 0.03  # of a GPU's memory that is left where activations of as few layers as possible are not kept


@dataclass(frozen=True)
class Layout:
    """The same training in another way on the same GPUs.

    Attributes:
        setting: the run.
        memory: of its fullest GPU.
        step_s: seconds of a step; None: the GPU's rate is not known.
        refusal: why the model can't be divided so; empty: it can.
        overrides: of `fitting`, that make it of the run that was asked for; none: it is that run.
    """

    setting: RunSpec
    memory: Memory
    step_s: float | None
    refusal: str = ""
    overrides: tuple[str, ...] = ()

    def fits(self, gpu: Gpu) -> bool:
        """Whether the GPU has the memory, and its machine what is kept there."""
        return self.memory.fits(gpu)

    @property
    def cost(self) -> tuple[float, bool, float]:
        """What to sort by: time, whether anything is to be changed, then memory."""
        return self.step_s or 0.0, bool(self.overrides), self.memory.needed

    @property
    def eight_bit(self) -> bool:
        """Whether its frozen weights are kept in 8 bits."""
        return bool(self.setting.eight_bit_base)


def splits(given: RunSpec, asked: RunSpec) -> Iterator[RunSpec]:
    """Yield every split of the processes into powers of two and what is asked for, the least model-parallel first.

    Of equally many: tensor before pipeline parallelism, which fills and empties; both before
    context parallelism, which divides no weights; experts and the optimizer's state are divided
    where that is required.

    Args:
        given: the run, with the least sizes.
        asked: the run with the sizes that were asked for.
    """

    def sizes(name: str) -> list[int]:
        possible = {getattr(given, name), getattr(asked, name), *SIZES}
        return sorted(size for size in possible if size >= getattr(given, name))

    contexts = [size for size in sizes("context") if size == 1 or given.transformer_engine]
    experts = [size for size in sizes("expert") if size == 1 or given.experts]
    sharding = [True]
    if not given.distributed_optimizer:
        sharding = [False, True] if given.optimizer == "adam" else [False]
    several = itertools.product(sizes("tensor"), sizes("pipeline"), contexts, experts, sharding)
    possible = []
    for tensor, pipeline, context, expert, sharded in several:
        groups, rest = divmod(given.world, tensor * pipeline * context)
        if rest or not groups or groups * context % expert:
            continue
        if sharded and groups * context == 1 and not asked.distributed_optimizer:
            continue
        rank = (tensor * pipeline * context, pipeline * context, context, expert, sharded)
        setting = replace(
            given,
            tensor=tensor,
            pipeline=pipeline,
            context=context,
            expert=expert,
            distributed_optimizer=sharded,
        )
        possible.append((rank, setting))
    for _, setting in sorted(possible, key=lambda item: item[0]):
        yield setting


def apply(cfg: DictConfig, setting: RunSpec, local: int) -> None:
    """Write a split, and what is computed again, into a configuration.

    Args:
        cfg: changed in place.
        setting: with the split.
        local: processes on each machine.
    """
    for name, key in KEYS.items():
        cfg.parallelism[key] = getattr(setting, name)
    cfg.trainer.recompute = setting.recompute
    cfg.trainer.recompute_layers = setting.recompute_layers
    cfg.trainer.offload_layers = setting.offload_layers
    cfg.parallelism.distributed_optimizer = setting.distributed_optimizer
    cfg.parallelism.nproc_per_node = local
    cfg.parallelism.auto = False
    cfg.parallelism.memory_gib = None


def check(cfg: DictConfig, setting: RunSpec, local: int, visible: int, architecture: Mapping[str, Any] | None) -> None:
    """Check that a model can be divided in a way.

    Args:
        cfg: what `part_of` returns; changed in place.
        setting: with the split.
        local: processes on each machine.
        visible: GPUs of each machine.
        architecture: fields of the model's config.json.

    Raises:
        UserError: it can't, and why.
    """
    apply(cfg, setting, local)
    checks.check_parallelism(cfg, visible, architecture)
    setting.check()


def part_of(cfg: DictConfig) -> DictConfig:
    """A copy of what decides whether a split is possible."""
    return OmegaConf.masked_copy(cfg, ["model", "trainer", "parallelism", "launch", "peft", "precision", "optimizer"])


def search(
    cfg: DictConfig,
    given: RunSpec,
    gpu: Gpu,
    visible: int,
    tokens: float | None = None,
    variants: Iterable[dict[str, Any]] = ({},),
    asked: RunSpec | None = None,
) -> Iterator[Layout]:
    """Every way to divide a run over its processes, in the order of `splits`, and those that aren't possible too.

    Args:
        cfg: of the run, with plain sizes.
        given: the run, with the least sizes.
        gpu: what each process runs on.
        visible: GPUs of each machine.
        tokens: of a step; None: full sequences.
        variants: fields of RunSpec, with the values that each split is tried with.
        asked: the run with the sizes that were asked for; None: these are the least.
    """
    part = part_of(cfg)
    architecture = model_checks.architecture(cfg.model)
    local = given.world // int(cfg.launch.nnodes)
    if tokens is None:
        tokens = given.global_batch * given.length
    for split in splits(given, asked or given):
        refusal = ""
        try:
            check(part, split, local, visible, architecture)
        except UserError as error:
            refusal = str(error)
        for variant in variants:
            setting = replace(split, **variant)
            step_s = None
            if not refusal:
                step_s = estimate_speed(setting, gpu, tokens).step_s
            yield Layout(setting, estimate_memory(setting), step_s, refusal)


def fitting(
    cfg: DictConfig,
    given: RunSpec,
    gpu: Gpu,
    tokens: float,
    typed: TypedSettings = PLAIN,
) -> list[Layout]:
    """The ways in which a run fits on as many GPUs, the fastest first: by split, recomputation and precision.

    Beside tensor parallelism, of which a micro-batch costs something whatever its size, also by larger micro-batches.
    Of those with weights alike, one that is slower and needs no less memory than another is left out.

    Args:
        cfg: of the run, with plain sizes.
        given: the run that was asked for.
        gpu: what each process runs on.
        tokens: of a step.
        typed: how the run was asked for. Where `trainer.micro_batch_size=auto` has chosen it would choose another size
            beside another split, so its choice is said.
    """
    if given.fsdp:  # divides the weights itself
        return []
    asked = _asked(given, typed.savings)
    whole = replace(asked, tensor=1, pipeline=1, expert=1, distributed_optimizer=False)
    precisions = [given.precision]
    if gpu.eight_bit and given.precision == "bf16" and replace(whole, precision="fp8").eight_bit_base:
        precisions.append("fp8")
    recomputations = asked.recomputations
    if asked.recompute != "none":
        recomputations = tuple(dict.fromkeys((asked.recompute, *RECOMPUTE)))
    variants = []
    for recompute, precision in itertools.product(recomputations, precisions):
        numbers: list[int | None] = [None]
        if recompute == asked.recompute and asked.recompute_layers is not None:
            numbers = [asked.recompute_layers, None]
        for number in numbers:
            variants.append({"recompute": recompute, "recompute_layers": number, "precision": precision})
    if not typed.chosen_micro_batch:
        variants += [variants[0] | {"micro_batch": times * given.micro_batch} for times in LARGER]
    room = gpu.memory_gib * GIB
    local = given.world // int(cfg.launch.nnodes)
    layouts = []
    for layout in search(cfg, whole, gpu, local, tokens, variants, asked):
        setting = layout.setting
        if layout.refusal or setting.context != given.context:  # which is asked for
            continue
        if setting.precision != given.precision and not setting.eight_bit_base:
            continue
        if setting.micro_batch != given.micro_batch and not _gains_by_larger(setting):
            continue
        if setting.recompute == "full" and asked.recompute != "full":
            if _fits(replace(setting, recompute=asked.recompute), room):
                continue
            layouts += savings(layout, gpu, tokens)
        elif layout.fits(gpu):
            layouts.append(layout)
    named = []
    for layout in layouts:
        words = overrides(given, layout.setting, typed)
        if words and typed.chosen_micro_batch:
            words += (f"trainer.micro_batch_size={given.micro_batch}",)
        named.append(replace(layout, overrides=words))
    return _worthwhile(named)


def _gains_by_larger(setting: RunSpec) -> bool:
    """Whether a run is possible with its micro-batches, larger than asked for, and may be faster."""
    is_whole = setting.global_batch % (setting.micro_batch * setting.data_parallel) == 0
    is_captured = not setting.graph or bool(setting.cuda_graph)  # if it has to be
    return setting.tensor > 1 and is_whole and is_captured


def _fits(setting: RunSpec, room: float) -> bool:
    return estimate_memory(setting).needed <= room


def savings(layout: Layout, gpu: Gpu, tokens: float) -> list[Layout]:
    """The ways in which a split fits whose activations are not all kept.

    As few layers as fit, with some room, are computed again, or wait in the host's memory; where computing all of them
    again isn't enough, also what that keeps waits there.

    Args:
        layout: the split with `trainer.recompute=full`.
        gpu: what each process runs on.
        tokens: of a step.
    """
    full = layout.setting
    most = math.ceil(max(full.stage_layers))
    again = [replace(full, recompute_layers=count) for count in range(1, most)]
    kept = replace(full, recompute="none", recompute_layers=None)
    away: list[RunSpec] = []
    both: list[RunSpec] = []
    if kept.offload and full.offload_layers is None:
        away = [replace(kept, offload_layers=count) for count in range(1, most + 1)]
        both = [replace(full, offload_layers=count) for count in range(1, most + 1)]
    fewest = [_first_that_fits(possible, gpu) for possible in (again, away)]
    if fewest[0] is None:
        fewest.append(full if layout.fits(gpu) else _first_that_fits(both, gpu))
    found = []
    for setting in filter(None, fewest):
        step_s = estimate_speed(setting, gpu, tokens).step_s
        found.append(replace(layout, setting=setting, memory=estimate_memory(setting), step_s=step_s))
    return found


def _first_that_fits(possible: list[RunSpec], gpu: Gpu) -> RunSpec | None:
    """The first of settings that require less and less of a GPU's memory which fits, with some room."""
    room = gpu.memory_gib * GIB * (1 - HEADROOM)
    first = bisect.bisect_left(possible, True, key=partial(_fits, room=room))
    if first == len(possible):
        return None
    return possible[first] if estimate_memory(possible[first]).fits_host(gpu) else None


def overrides(given: RunSpec, setting: RunSpec, typed: TypedSettings = PLAIN) -> tuple[str, ...]:
    """What makes one run of the other, where they differ in split, recomputation, precision and micro-batches.

    Args:
        given: the run that was asked for, or what `parallelism=auto` has made of it.
        setting: the other one.
        typed: how the run was asked for. Where `parallelism=auto` has chosen the split is always said.
    """
    if _chosen(setting) == _chosen(given):
        return ()
    changed = []
    if typed.chosen_split or _sizes(setting) != _sizes(given):
        changed += split_overrides(setting, typed)
    asked = _asked(given, typed.savings)
    if setting.recompute != asked.recompute:
        changed.append(f"trainer.recompute={setting.recompute}")
    if setting.recompute_layers != asked.recompute_layers:
        changed.append(f"trainer.recompute_layers={setting.recompute_layers or 'null'}")
    if setting.offload_layers != asked.offload_layers:
        changed.append(f"trainer.offload_layers={setting.offload_layers or 'null'}")
    if setting.precision != given.precision:
        changed.append(f"precision={setting.precision}")
    if setting.micro_batch != given.micro_batch:
        changed.append(f"trainer.micro_batch_size={setting.micro_batch}")
    return tuple(changed)


def _asked(given: RunSpec, typed: TypedSavings | None) -> RunSpec:
    """The run with the activations that it keeps as before `parallelism=auto` has chosen; see `overrides`."""
    if typed is None:
        return given
    recompute, is_open = read_recompute(typed.recompute)
    layers = None
    if recompute == given.recompute:
        layers = given.recompute_layers
    return replace(
        given,
        recompute=recompute,
        recompute_open=is_open,
        recompute_layers=layers,
        offload_layers=typed.offload_layers,
    )


def _chosen(setting: RunSpec) -> tuple[object, ...]:
    """All that `overrides` compares."""
    kept = setting.recompute, setting.recompute_layers, setting.offload_layers
    return _sizes(setting), *kept, setting.precision, setting.micro_batch


def _worthwhile(layouts: list[Layout]) -> list[Layout]:
    """What was asked for, and of the others those that no other one of the same weights beats in time and memory."""
    kept = []
    for eight_bit in (False, True):
        least = float("inf")  # memory of those before
        alike = []
        for layout in sorted(layouts, key=lambda layout: layout.cost):
            is_better = layout.memory.needed < least or not layout.overrides
            if layout.eight_bit == eight_bit and is_better:
                least = min(least, layout.memory.needed)
                alike.append(layout)
        kept += alike[:MOST_SHOWN]
        kept += [layout for layout in alike[MOST_SHOWN:] if not layout.overrides]
    return sorted(kept, key=lambda layout: layout.cost)


def _sizes(setting: RunSpec) -> tuple[int, ...]:
    """The model-parallel sizes, and whether the optimizer is divided."""
    return (*(getattr(setting, name) for name in KEYS), int(setting.distributed_optimizer))


def split_overrides(setting: RunSpec, typed: TypedSettings = PLAIN) -> list[str]:
    """The file of conf/parallelism with a run's sizes, else the sizes themselves; and what another file doesn't set.

    Args:
        setting: the run.
        typed: how the run was asked for.
    """
    words = _split_by_file(setting)
    values = {key: str(getattr(setting, size)) for size, key in KEYS.items()}
    values[DIVIDED_STATE] = str(setting.distributed_optimizer).lower()
    for key, value in values.items():
        word = f"parallelism.{key}={value}"
        if key in typed.pinned and word not in words:
            words.append(word)
    return words + typed.processes_override(setting, other_file=True)


def _split_by_file(setting: RunSpec) -> list[str]:
    for sharded in (setting.distributed_optimizer, False):
        name = _files().get(_sizes(replace(setting, distributed_optimizer=sharded)))
        if name is not None and sharded == setting.distributed_optimizer:
            return [f"parallelism={name}"]
        if name is not None:
            return [f"parallelism={name}", f"parallelism.{DIVIDED_STATE}=true"]
    words = ["parallelism=ddp"]
    for size, key in KEYS.items():
        if getattr(setting, size) > 1:
            words.append(f"parallelism.{key}={getattr(setting, size)}")
    if setting.distributed_optimizer:
        words.append(f"parallelism.{DIVIDED_STATE}=true")
    return words


@cache
def _files() -> dict[tuple[int, ...], str]:
    """Sizes -> the file of conf/parallelism that has them."""
    names = {}
    for path in sorted((SHIPPED / "parallelism").glob("*.yaml")):
        values = yaml_file.read(path)
        sizes = [int(values.get(key) or 1) for key in KEYS.values()]
        if path.stem not in ("auto", "fsdp", "single"):
            names[(*sizes, int(bool(values.get("distributed_optimizer"))))] = path.stem
    return names
