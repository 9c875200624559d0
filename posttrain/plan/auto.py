"""Resolve `parallelism=auto` and `trainer.micro_batch_size=auto`.

The first takes the split of the model over the processes that is fastest of those with which a run fits, by the search
that `python -m posttrain.plan` lists; where none is enough, with activations computed again. The second takes the most
sequences at once that fit then.
"""

import itertools
import math
from dataclasses import dataclass, replace

from omegaconf import DictConfig

from posttrain.errors import UserError
from posttrain.patches import Platform
from posttrain.plan import advice, layouts
from posttrain.plan.memory import GIB, Memory, estimate_memory, host_room
from posttrain.plan.speed import estimate_speed, with_rate
from posttrain.plan.typed_settings import TypedSettings
from posttrain.spec import checks, model_checks
from posttrain.spec.parallel_sizes import KEYS
from posttrain.spec.resolve import AUTO, resolve_spec
from posttrain.spec.run_spec import RunSpec
from posttrain.utils.gpus import Gpu, smallest_gpu

WORTH = 0.97  # of a step's time: what saving activations must come to, since page-locking memory prolongs the start


@dataclass(frozen=True)
class Choice:
    """A split of the model over processes.

    Attributes:
        local: processes on each machine.
        setting: the run with that split.
        memory: of its fullest GPU.
        undivided: GiB that it requires with data parallelism alone.
        gpus: GPUs of each machine, of which `local` are used.
        refused: why a smaller split that fits as well was rejected; empty if there is none.
        saves: whether activations that are computed again or wait in the host's memory are part of the choice.
        without: of a choice that saves, the fastest split that does not: its sizes, and its time in times of the
            choice's; None: nothing fits without.
        answering: of a split without sample answers the fastest that fits and has them: its overrides, and its time in
            times of the choice's; None: there is none.
    """

    local: int
    setting: RunSpec
    memory: Memory
    undivided: float
    gpus: int
    refused: str = ""
    saves: bool = False
    without: tuple[str, float] | None = None
    answering: tuple[str, float] | None = None

    def describe(self, memory_gib: float) -> str:
        """One line about what was chosen and why.

        Args:
            memory_gib: of one GPU.
        """
        s = self.setting
        sizes = format_sizes(s) or ["no model parallelism"]
        if s.data_parallel > 1:
            sizes.append(f"data {s.data_parallel}")
        if s.distributed_optimizer:
            sizes.append("distributed optimizer")
        needed = round(self.memory.needed / GIB, 2)  # as the plan says it
        if self.saves:
            sizes.append(_saving(s))
            if self.memory.host:
                sizes[-1] += f" ({self.memory.host / GIB:.1f} GiB of the host's memory per GPU)"
            if self.without:
                sizes[-1] += " since {} without takes {:.2f} times the time".format(*self.without)
            elif needed <= memory_gib:
                sizes[-1] += " since nothing fits without"
        line = f"parallelism=auto: {', '.join(sizes)}: "
        line += f"needs {needed:.1f} of {memory_gib:.1f} GiB per GPU"
        if self.undivided > needed:
            line += f", {self.undivided:.1f} undivided"
        if self.local < self.gpus:
            line += f"; {self.local} of {self.gpus} GPUs used"
        if self.refused:
            line += f"; a smaller split was rejected: {self.refused}"
        if s.answers and not s.sample_answers:
            line += f"; {self._without_answers()}"
        return line

    def _without_answers(self) -> str:
        """That there are no sample answers, and what would have them."""
        s = self.setting
        said = f"no sample answers (trainer.num_generations={s.answers}), since {s.sample_answers.reason}: "
        if self.answering is None:
            return f"{said}nor has any other split that fits"
        overrides, slower = self.answering
        return f"{said}{overrides} has them, in {slower:.2f} times the time"


def _saving(setting: RunSpec) -> str:
    """The overrides that have activations computed again, or wait in the host's memory."""
    overrides = []
    if setting.recompute == "full":
        overrides.append("trainer.recompute=full")
    if setting.recompute_layers is not None:
        overrides.append(f"trainer.recompute_layers={setting.recompute_layers}")
    if setting.offload_layers is not None:
        overrides.append(f"trainer.offload_layers={setting.offload_layers}")
    return " ".join(overrides)


def format_sizes(s: RunSpec) -> list[str]:
    """The model-parallel sizes above 1, as "tensor 2"."""
    sizes = []
    for name in KEYS:
        size = getattr(s, name)
        if size > 1:
            sizes.append(f"{name} {size}")
    return sizes


def resolve(
    cfg: DictConfig,
    visible: int,
    memory_gib: float | None = None,
    transformer_engine: bool | None = None,
) -> str | None:
    """Replace parallelism.auto and trainer.micro_batch_size=auto in `cfg` by sizes.

    Args:
        cfg: a configuration that `checks.check_settings` has nothing against; changed in place.
        visible: GPUs of each machine; 0: a CPU, where nothing is split beyond what is given.
        memory_gib: of one GPU; None: what nvidia-smi reports, unless parallelism.memory_gib is set.
        transformer_engine: whether the run has it; None: whether it is installed here.

    Returns:
        What was chosen and why, a line each; None where there was nothing to choose.

    Raises:
        UserError: the run fits in no way, or the GPUs' memory is not known.
    """
    choose_split = cfg.parallelism.auto
    choose_batch = cfg.trainer.micro_batch_size == AUTO
    if not choose_split and not choose_batch:
        return None
    if not visible:
        return _resolve_on_cpu(cfg, choose_split, choose_batch)
    gpu = smallest_gpu()
    memory_gib = cfg.parallelism.memory_gib or memory_gib
    if memory_gib is None and gpu is not None:
        memory_gib = gpu.memory_gib
    if memory_gib is None:
        raise UserError("`parallelism.memory_gib`: nvidia-smi doesn't report how much memory the GPUs have; set it")
    if transformer_engine is None:
        transformer_engine = Platform.detect("cuda").transformer_engine
    gpu = replace(gpu or Gpu("here", None, memory_gib), memory_gib=memory_gib)
    return "\n".join(resolve_on(cfg, visible, gpu, transformer_engine))


def resolve_on(cfg: DictConfig, visible: int, gpu: Gpu, transformer_engine: bool, has_to_fit: bool = True) -> list[str]:
    """As `resolve`, on GPUs that are known.

    Args:
        cfg: changed in place.
        visible: GPUs of each machine.
        gpu: each of them.
        transformer_engine: whether the run has it.
        has_to_fit: whether a run that fits in no way is refused; else it gets the sizes that need the least memory.

    Returns:
        What was chosen and why, a line each.

    Raises:
        UserError: as `resolve`.
    """
    choose_batch = cfg.trainer.micro_batch_size == AUTO
    if choose_batch:
        cfg.trainer.micro_batch_size = 1
    lines = []
    if cfg.parallelism.auto:
        typed = TypedSettings.of_auto(cfg, visible)
        choice = choose(cfg, visible, gpu, transformer_engine)
        if has_to_fit and not choice.memory.fits(gpu):
            raise UserError(_refusal(choice, gpu, typed))
        layouts.apply(cfg, choice.setting, choice.local)
        lines.append(choice.describe(gpu.memory_gib))
    if choose_batch:
        world = checks.world_size(cfg, visible)
        lines.append(fill_memory(cfg, world, gpu, transformer_engine))
    return lines


def _resolve_on_cpu(cfg: DictConfig, choose_split: bool, choose_batch: bool) -> str:
    lines = []
    if choose_split:
        count = checks.nproc_per_node(cfg, 0)
        cfg.parallelism.nproc_per_node = count
        cfg.parallelism.auto = False
        processes = "1 process" if count == 1 else f"{count} processes"
        lines.append(f"parallelism=auto: on a CPU, {processes}")
    if choose_batch:
        cfg.trainer.micro_batch_size = 1
        lines.append("trainer.micro_batch_size=auto: on a CPU, 1")
    return "\n".join(lines)


def fill_memory(cfg: DictConfig, world: int, gpu: Gpu, transformer_engine: bool) -> str:
    """Set the largest micro-batch size in `cfg` that fits, 1 where none does; in a pipeline the fastest that fits.

    A pipeline's stages wait for the first and the last micro-batch, so that few large ones can take twice the time.

    Args:
        cfg: with plain parallel sizes; changed in place.
        world: processes over all machines.
        gpu: each of them.
        transformer_engine: whether the run has it.

    Returns:
        A line about the size.

    Raises:
        UserError: what was asked for can't be done, whatever the size.
    """
    given = resolve_spec(cfg, world, transformer_engine)
    given.check()
    sequences, rest = divmod(given.global_batch, given.data_parallel)  # of a process and step
    if rest:  # which no size divides, and the check of the batch says
        sequences = 1
    tokens = given.global_batch * given.length
    chosen, needed = given, estimate_memory(given).needed
    fastest = math.inf
    for size in range(max(sequences, 1), 0, -1):
        setting = replace(given, micro_batch=size)
        uncaptured = bool(setting.graph) and not setting.cuda_graph  # which it has to be
        if size > 1 and (sequences % size or uncaptured):
            continue
        memory = estimate_memory(setting)
        if not memory.fits(gpu):
            continue
        step_s = estimate_speed(setting, with_rate(gpu), tokens).step_s or 0.0
        if step_s < fastest:
            chosen, needed, fastest = setting, memory.needed, step_s
        if given.pipeline == 1:
            break
    cfg.trainer.micro_batch_size = chosen.micro_batch
    line = f"trainer.micro_batch_size=auto: {chosen.micro_batch}: "
    line += f"needs {needed / GIB:.1f} of {gpu.memory_gib:.1f} GiB per GPU"
    if given.pipeline > 1:
        line += ", the fastest that fits in a pipeline"
    return line


def choose(cfg: DictConfig, visible: int, gpu: Gpu, transformer_engine: bool) -> Choice:
    """Return the fastest split that fits, else the one that requires the least memory.

    Sequences are divided (context parallelism) no more than is needed. Where trainer.recompute leaves it open,
    activations are computed again or wait in the host's memory if nothing fits otherwise, or if that is faster by more
    than a start costs. Of splits that are equally fast the least model-parallel one is taken.

    Args:
        cfg: of the run.
        visible: GPUs of each machine.
        gpu: each of them.
        transformer_engine: whether the run has it.

    Raises:
        UserError: none is possible, with the reason for the undivided one.
    """
    most = cfg.parallelism.nproc_per_node or visible
    given = resolve_spec(cfg, most * cfg.launch.nnodes, transformer_engine)
    whole = replace(given, tensor=1, pipeline=1, context=1, expert=1, distributed_optimizer=False)
    undivided = estimate_memory(whole).needed / GIB
    typed = TypedSettings.of_auto(cfg, most)
    refusals: list[str] = []
    # Fewer processes than GPUs only where the batch can't be divided by their number.
    for local in range(most, 0, -1):
        least = None
        kept: list[layouts.Layout] = []
        saved: list[layouts.Layout] = []
        refused = {}
        for recompute in given.recomputations:
            setting = replace(given, world=local * cfg.launch.nnodes, recompute=recompute)
            found = list(layouts.search(cfg, setting, with_rate(gpu), visible))
            possible = [layout for layout in found if not layout.refusal]
            refusals += [layout.refusal for layout in found if layout.refusal]
            if not possible:
                continue
            saves = recompute != given.recompute
            refused[saves] = _first_refusal(found, gpu)
            if saves:
                tokens = given.global_batch * given.length
                ways = [layouts.savings(layout, with_rate(gpu), tokens) for layout in possible]
                saved = list(itertools.chain.from_iterable(ways))
            else:
                kept = [layout for layout in possible if layout.fits(gpu)]
            smallest = min(possible, key=lambda layout: layout.memory.needed)
            least = Choice(local, smallest.setting, smallest.memory, undivided, most, refused[saves], saves)
        best = _fastest(kept, saved)
        if best is not None:
            saves = best in saved
            choice = Choice(local, best.setting, best.memory, undivided, most, refused[saves], saves)
            choice = replace(choice, without=_without(best, kept) if saves else None)
            return replace(choice, answering=_answering(typed, best, kept, saved))
        if least:
            return least
        if cfg.parallelism.nproc_per_node:
            break
    if not refusals:  # no split has the sizes that are given
        part = layouts.part_of(cfg)
        part.parallelism.nproc_per_node = most
        checks.check_parallelism(part, visible, model_checks.architecture(cfg.model))
    raise UserError(next(iter(refusals), "`parallelism=auto`: no split of the processes is possible"))


def _fastest(kept: list[layouts.Layout], saved: list[layouts.Layout]) -> layouts.Layout | None:
    """The fastest layout that divides sequences no more than is needed; None: there is none.

    Args:
        kept: layouts that fit with all activations kept.
        saved: those that fit without.
    """
    plain, other = _first(kept), _first(saved)
    if plain is None or other is None:
        return plain or other
    if other.setting.context <= plain.setting.context and (other.step_s or 0.0) < WORTH * (plain.step_s or 0.0):
        return other
    return plain


def _first(possible: list[layouts.Layout]) -> layouts.Layout | None:
    """The fastest of those that divide sequences least; None: there is none."""
    return min(possible, key=lambda layout: (layout.setting.context, layout.step_s or 0.0), default=None)


def _without(best: layouts.Layout, kept: list[layouts.Layout]) -> tuple[str, float] | None:
    """See `Choice.without`."""
    plain = _first(kept)
    if plain is None or not plain.step_s or not best.step_s:
        return None
    return ", ".join(format_sizes(plain.setting)) or "no model parallelism", plain.step_s / best.step_s


def _answering(
    typed: TypedSettings, best: layouts.Layout, kept: list[layouts.Layout], saved: list[layouts.Layout]
) -> tuple[str, float] | None:
    """See `Choice.answering`.

    Args:
        typed: how the run was asked for.
        best: the layout of the choice.
        kept, saved: see `_fastest`.
    """
    others = [layout for layout in [*kept, *saved] if layout.setting.sample_answers]
    other = min(others, key=lambda layout: layout.step_s or 0.0, default=None)
    if other is None or not other.step_s or not best.step_s:
        return None
    overrides = layouts.split_overrides(other.setting, typed)
    if other in saved:
        overrides.append(_saving(other.setting))
    return " ".join(overrides), other.step_s / best.step_s


def _first_refusal(found: list[layouts.Layout], gpu: Gpu) -> str:
    """Why a split was rejected that fits and is less model-parallel than all others that fit; empty: there is none."""
    fitting = [layout for layout in found if layout.fits(gpu)]
    return fitting[0].refusal if fitting else ""


def _refusal(choice: Choice, gpu: Gpu, typed: TypedSettings) -> str:
    """The message for a run that fits in no way."""
    s = choice.setting
    sizes = ", ".join(format_sizes(s)) or "undivided"
    if choice.saves:
        sizes += ", trainer.recompute=full"
    count = "1 GPU" if s.world == 1 else f"{s.world} GPUs"
    message = (
        f"`parallelism=auto`: the run does not fit on {count} of {gpu.memory_gib:.1f} GiB: "
        f"it needs {choice.memory.needed / GIB:.1f} GiB on each ({sizes})"
    )
    if not choice.memory.fits_host(gpu):
        message += (
            f", and {choice.memory.host / GIB:.1f} GiB of the host's memory for the activations of each, "
            f"which may have {host_room(gpu):.1f}"
        )
    best = advice.cheapest(s, gpu, typed)
    if best is None:
        return message
    message += f"; it would with {' '.join(best.overrides)}"
    if best.setting.world > s.world:
        message += f" on {best.setting.world} GPUs"
    return message + f" ({best.memory.needed / GIB:.1f} GiB)"
