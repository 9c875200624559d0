"""What is left to the machine: `parallelism=auto` and `trainer.micro_batch_size=auto`.

The first takes the smallest model-parallel sizes with which a run fits, the rest data parallel; the second the most
sequences at once that fit then.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

from omegaconf import DictConfig, OmegaConf

from posttrain import check
from posttrain.errors import UserError
from posttrain.patches import Platform
from posttrain.plan import advice, gpus
from posttrain.plan.gpus import Gpu
from posttrain.plan.memory import GIB, Memory, memory
from posttrain.plan.setting import Setting

SIZES = (1, 2, 4, 8, 16)
AUTO = "auto"
FIELDS = {
    "tensor": "tensor_model_parallel_size",
    "pipeline": "pipeline_model_parallel_size",
    "context": "context_parallel_size",
    "expert": "expert_model_parallel_size",
}


@dataclass(frozen=True)
class Choice:
    """A division over processes.

    Attributes:
        local: processes on each machine.
        setting: the run so divided.
        memory: of its fullest GPU.
        undivided: GiB that it needs with data parallelism alone.
        gpus: GPUs of each machine, of which `local` are used.
        refused: why a smaller division that fits as well is not possible; empty if there is none.
    """

    local: int
    setting: Setting
    memory: Memory
    undivided: float
    gpus: int
    refused: str = ""

    def line(self, memory_gib: float) -> str:
        """What was chosen and why."""
        s = self.setting
        sizes = [f"{name} {getattr(s, name)}" for name in FIELDS if getattr(s, name) > 1] or ["no model parallelism"]
        sizes += [f"data {s.data_parallel}"] if s.data_parallel > 1 else []
        sizes += ["distributed optimizer"] if s.distributed_optimizer else []
        need = f"needs {self.memory.needed / GIB:.1f} of {memory_gib:.1f} GiB per GPU"
        if self.undivided > self.memory.needed / GIB:
            need += f", {self.undivided:.1f} undivided"
        used = f"; {self.local} of {self.gpus} GPUs used" if self.local < self.gpus else ""
        less = f"; not less divided: {self.refused}" if self.refused else ""
        return f"parallelism=auto: {', '.join(sizes)}: {need}{used}{less}"


def resolve(
    cfg: DictConfig, visible: int, memory_gib: float | None = None, transformer_engine: bool | None = None
) -> str | None:
    """Put plain sizes into `cfg` where it has parallelism.auto or trainer.micro_batch_size=auto.

    Args:
        cfg: a composed configuration; changed in place.
        visible: GPUs of each machine; 0: a CPU, where nothing is divided beyond what is given.
        memory_gib: of one GPU; None: what nvidia-smi says, if parallelism.memory_gib doesn't.
        transformer_engine: whether the run has it; None: whether it is installed here.

    Returns:
        A line that says what was chosen and why; None where there was nothing to choose.

    Raises:
        UserError: the run fits in no way, or the GPUs' memory is not known.
    """
    p, t = cfg.parallelism, cfg.trainer
    fill = t.micro_batch_size == AUTO
    if not p.auto and not fill:
        return None
    check.settings(cfg, visible)
    if fill:
        t.micro_batch_size = 1
    lines = []
    if not visible:
        if p.auto:
            p.nproc_per_node, p.auto = check.nproc_per_node(cfg, 0), False
            count = f"{p.nproc_per_node} process{'es' if p.nproc_per_node > 1 else ''}"
            lines.append(f"parallelism=auto: on a CPU, {count}")
        if fill:
            lines.append("trainer.micro_batch_size=auto: on a CPU, 1")
        return "\n".join(lines)
    memory_gib = p.memory_gib or memory_gib or _smallest()
    if memory_gib is None:
        raise UserError("`parallelism.memory_gib`: nvidia-smi doesn't say how much memory the GPUs have; give it")
    if transformer_engine is None:
        transformer_engine = Platform.detect("cuda").transformer_engine
    if p.auto:
        found = choose(cfg, visible, memory_gib, transformer_engine)
        if found.memory.needed > memory_gib * GIB:
            raise UserError(_refusal(found, memory_gib))
        put(cfg, found)
        lines.append(found.line(memory_gib))
    if fill:
        lines.append(fill_memory(cfg, check.world_size(cfg, visible), memory_gib, transformer_engine))
    return "\n".join(lines)


def fill_memory(cfg: DictConfig, world: int, memory_gib: float, transformer_engine: bool) -> str:
    """Put the largest micro-batch into `cfg` that fits, 1 where none does; returns a line that says so.

    Args:
        cfg: with plain parallel sizes; changed in place.
        world: processes over all machines.
        memory_gib: of one GPU.
        transformer_engine: whether the run has it.
    """
    given = Setting.of(cfg, world, transformer_engine)
    mine = given.global_batch // given.data_parallel
    sizes = [size for size in range(mine, 0, -1) if mine % size == 0] or [1]
    needs = ((size, memory(replace(given, micro_batch=size)).needed / GIB) for size in sizes)
    size, need = next(((size, need) for size, need in needs if need <= memory_gib), (1, memory(given).needed / GIB))
    cfg.trainer.micro_batch_size = size
    return f"trainer.micro_batch_size=auto: {size}: needs {need:.1f} of {memory_gib:.1f} GiB per GPU"


def put(cfg: DictConfig, choice: Choice) -> None:
    """Write a choice into the configuration."""
    p = cfg.parallelism
    for name, key in FIELDS.items():
        p[key] = getattr(choice.setting, name)
    p.distributed_optimizer = choice.setting.distributed_optimizer
    p.nproc_per_node, p.auto, p.memory_gib = choice.local, False, None


def choose(cfg: DictConfig, visible: int, memory_gib: float, transformer_engine: bool) -> Choice:
    """The first division that fits, else the one that needs the least memory.

    Raises:
        UserError: none is possible, with the reason for the undivided one.
    """
    part = OmegaConf.masked_copy(cfg, ["model", "trainer", "parallelism", "launch"])
    most = cfg.parallelism.nproc_per_node or visible
    given = Setting.of(cfg, most * cfg.launch.nnodes, transformer_engine)
    whole = memory(replace(given, tensor=1, pipeline=1, context=1, expert=1, distributed_optimizer=False)).needed / GIB
    reason, refused = None, ""
    for local in range(most, 0, -1):  # fewer than there are only where the batch can't be divided by their number
        least = None
        for setting in divisions(replace(given, world=local * cfg.launch.nnodes)):
            choice = Choice(local, setting, memory(setting), whole, most, refused)
            fits = choice.memory.needed <= memory_gib * GIB
            if least and choice.memory.needed >= least.memory.needed:
                continue
            put(part, choice)
            try:
                check.divisibility(part, visible)
            except UserError as error:
                reason = reason or error
                refused = refused or (str(error) if fits else "")
                continue
            least = choice
            if fits:
                return choice
        if least:
            return least
        if cfg.parallelism.nproc_per_node:
            break
    raise reason or UserError("`parallelism=auto`: no division of the processes is possible")


def divisions(given: Setting) -> Iterator[Setting]:
    """Every division of the processes, the least model-parallel first.

    Of equally many: tensor before pipeline parallelism, which fills and empties; both before context parallelism,
    which divides no weights; experts and the optimizer's state are divided where that is needed.
    """
    contexts = SIZES if given.transformer_engine else (1,)
    experts = SIZES if given.shape.experts else (1,)
    shards = (True,) if given.distributed_optimizer else (False, True)
    found = []
    for tensor, pipeline, context, expert, sharded in itertools.product(SIZES, SIZES, contexts, experts, shards):
        sizes = {"tensor": tensor, "pipeline": pipeline, "context": context, "expert": expert}
        if any(size < getattr(given, name) for name, size in sizes.items()):
            continue
        groups, rest = divmod(given.world, tensor * pipeline * context)
        if rest or not groups or groups * context % expert or (sharded and groups * context == 1):
            continue
        # Without Transformer Engine Megatron can't load its sharded optimizer's checkpoints.
        if sharded and not given.transformer_engine and not given.distributed_optimizer:
            continue
        order = tensor * pipeline * context, pipeline * context, context, expert, sharded
        found.append((order, replace(given, **sizes, distributed_optimizer=sharded)))
    yield from (setting for _, setting in sorted(found, key=lambda item: item[0]))


def _smallest() -> float | None:
    """Memory of the smallest visible GPU, GiB."""
    return min((gpu.memory_gib for gpu in gpus.detected()), default=None)


def _refusal(found: Choice, memory_gib: float) -> str:
    """The message for a run that fits in no way."""
    s = found.setting
    best = advice.cheapest(s, Gpu("here", None, memory_gib))
    more = f" on {best.setting.world} GPUs" if best and best.setting.world > s.world else ""
    change = f"; it would with {' '.join(best.words)}{more} ({best.memory.needed / GIB:.1f} GiB)" if best else ""
    sizes = ", ".join(f"{name} {getattr(s, name)}" for name in FIELDS if getattr(s, name) > 1) or "undivided"
    count = f"{s.world} GPU{'s' if s.world > 1 else ''}"
    return (
        f"`parallelism=auto`: the run does not fit on {count} of {memory_gib:.1f} GiB: "
        f"it needs {found.memory.needed / GIB:.1f} GiB on each ({sizes}){change}"
    )
