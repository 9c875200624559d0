"""Find changes that make a run fit: single ones and combinations, by their cost."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from posttrain.peft import LoRA
from posttrain.plan.memory import Memory, estimate_memory
from posttrain.plan.speed import estimate_speed, with_rate
from posttrain.plan.typed_settings import TypedSettings
from posttrain.spec.parallel_sizes import Counts
from posttrain.spec.run_spec import RunSpec
from posttrain.spec.shape import Adapters
from posttrain.utils.gpus import Gpu

PLAIN = TypedSettings()
KINDS = ("speed", "state", "format", "gpus", "data", "result")  # the first are preferred


@dataclass(frozen=True)
class Edit:
    """One change of a setting.

    Attributes:
        kind: "speed", "state" (the optimizer's in 16 bits), "format" (8-bit products), "gpus" (more of them), "data"
            (sequences get shorter) or "result" (a different training).
        overrides: of the command line.
        fields: of RunSpec, with their new values.
    """

    kind: str
    overrides: tuple[str, ...]
    fields: dict[str, Any]


@dataclass(frozen=True)
class Change:
    """A changed setting.

    Attributes:
        overrides: of the command line.
        kind: the worst of its edits, see `Edit`.
        setting: with the change.
        memory: of the setting.
        slower: time of an epoch over that without the change.
        kinds: of its edits.
    """

    overrides: tuple[str, ...]
    kind: str
    setting: RunSpec
    memory: Memory
    slower: float
    kinds: tuple[str, ...]

    @property
    def cost(self) -> tuple[list[int], int, int, bool, float]:
        """What to sort by: what it changes of the training, how it computes the same, GPUs, rounded moments, time.

        A change of the training isn't made on top of another that is enough by itself, though it saves time.
        """
        ranks = sorted((KINDS.index(kind) for kind in self.kinds), reverse=True)
        first = KINDS.index("data")
        training = [rank for rank in ranks if rank >= first]
        same = max((rank for rank in ranks if rank < first), default=0)
        return training, same, self.setting.world, "state" in self.kinds, self.slower

    def fits(self, gpu: Gpu) -> bool:
        """Whether the GPU has the memory, and its machine what is kept there."""
        return self.memory.fits(gpu)


def edits(s: RunSpec, gpu: Gpu, typed: TypedSettings = PLAIN) -> Iterator[list[Edit]]:
    """Yield lists of alternatives; a combination takes one of each list at most. For the arguments see `changes`."""
    smaller = []
    for size in (8, 4, 2, 1):
        if size < s.micro_batch and s.micro_batch % size == 0:
            override = f"trainer.micro_batch_size={size}"
            smaller.append(Edit("speed", (override,), {"micro_batch": size}))
    yield smaller
    if s.recompute != "full":
        yield [Edit("speed", ("trainer.recompute=full",), {"recompute": "full"})]
    elif s.recompute_layers is not None:
        yield [Edit("speed", ("trainer.recompute_layers=null",), {"recompute_layers": None})]
    if s.recompute == "full" and s.offload and s.offload_layers is None:  # what that keeps
        layers = s.known_shape.layers
        yield [Edit("speed", (f"trainer.offload_layers={layers}",), {"offload_layers": layers})]
    divisible = s.optimizer == "adam" and not s.divides_state and not s.fsdp
    if s.data_parallel * s.context > 1 and divisible:
        override = "parallelism.distributed_optimizer=true"
        yield [Edit("speed", (override,), {"distributed_optimizer": True})]
    if s.bf16_adam and not s.bf16_state:
        yield [Edit("state", ("optimizer=adam_bf16",), {"bf16_state": True})]
    if not s.fsdp:  # which divides over data-parallel processes alone
        yield list(_tensor_edits(s, typed))
    if s.packing and s.length >= 1024:
        half = int(s.length) // 2
        yield [Edit("data", (f"trainer.seq_length={half}",), {"length": half})]
    if s.adapters is None:
        words: tuple[str, ...] = ("peft=lora",)
        if s.bf16_state:  # which is of all weights alone
            words += ("optimizer=adam",)
        yield [Edit("result", words, _lora_fields(s))]
    if gpu.eight_bit and s.precision == "bf16" and replace(s, precision="fp8").eight_bit_base:
        yield [Edit("format", ("precision=fp8",), {"precision": "fp8"})]


def _lora_fields(s: RunSpec) -> dict[str, Any]:
    """What `peft=lora optimizer=adam` sets, with its default values."""
    lora = LoRA()
    return {
        "adapter": True,
        "adapters": Adapters.from_targets(s.known_shape, "LoRA", lora.rank, lora.target_modules, s.transformer_engine),
        "every_layer_fused": lora.every_layer_fused,
        "fused": lora.fused,
        "recompute_norms": lora.recompute_norms,
        "dropout": lora.dropout,
        "bf16_state": False,
    }


def _tensor_edits(s: RunSpec, typed: TypedSettings) -> Iterator[Edit]:
    """Larger tensor-parallel sizes, with more GPUs where there are too few or their number can't be divided."""
    shape = s.known_shape
    counts = Counts(heads=shape.heads, groups=shape.groups)
    for size in (2, 4, 8):
        divided = replace(s, tensor=size)
        if size <= s.tensor or any(counts.undivided(divided)) or s.length % divided.micro_batch_multiple:
            continue
        unit = math.lcm(divided.model_parallel, s.machines)
        divided = replace(divided, world=math.ceil(s.world / unit) * unit)
        kind = "speed" if divided.world == s.world else "gpus"
        words = [f"parallelism.tensor_model_parallel_size={size}"]
        has_file = _is_undivided(s) and not typed.chosen_split and not typed.pins_split
        if has_file:
            words = [f"parallelism=tp{size}"]
        words += typed.processes_override(divided, has_file)
        yield Edit(kind, tuple(words), {"tensor": size, "world": divided.world})


def _is_undivided(s: RunSpec) -> bool:
    """Whether there is nothing that another file of `parallelism` would take back."""
    return s.model_parallel * s.expert == 1 and not s.distributed_optimizer


def changes(
    s: RunSpec, gpu: Gpu, together: int = 1, tokens: float | None = None, typed: TypedSettings = PLAIN
) -> list[Change]:
    """Return every possible combination of `together` changes, the cheapest first.

    Args:
        s: the run.
        gpu: what it runs on.
        together: how many changes.
        tokens: of a step; None: full sequences.
        typed: how the run was asked for.
    """
    possible = []
    if tokens is None:
        tokens = s.global_batch * s.length
    gpu = with_rate(gpu)
    before = estimate_speed(s, gpu, tokens).step_s
    for lists in itertools.combinations(list(edits(s, gpu, typed)), together):
        for chosen in itertools.product(*lists):
            change = _apply(s, gpu, chosen, tokens, before)
            if change is not None:
                possible.append(change)
    return sorted(possible, key=lambda change: change.cost)


def _apply(s: RunSpec, gpu: Gpu, chosen: tuple[Edit, ...], tokens: float, before: float | None) -> Change | None:
    """The change of several edits; None where they are not possible together.

    Args:
        s: the run.
        gpu: what it runs on.
        chosen: the edits.
        tokens: of a step without them; of shorter sequences there are fewer.
        before: seconds of a step without them; None: not known.
    """
    fields: dict[str, Any] = {}
    for edit in chosen:
        if any(fields.get(name, value) != value for name, value in edit.fields.items()):
            return None  # one would take the other back
        fields |= edit.fields
    changed = replace(s, **fields)
    if changed.precision == "fp8" and not changed.eight_bit_base:
        return None
    if changed.global_batch % (changed.micro_batch * changed.data_parallel):
        return None
    if changed.world // changed.pipeline % changed.expert:
        return None
    shorter = changed.length / s.length
    after = estimate_speed(changed, gpu, tokens * shorter).step_s
    slower = 1.0
    if after and before:
        slower = after / before / shorter
    overrides = tuple(itertools.chain.from_iterable(edit.overrides for edit in chosen))
    kinds = tuple(edit.kind for edit in chosen)
    worst = max(kinds, key=KINDS.index)
    return Change(overrides, worst, changed, estimate_memory(changed), slower, kinds)


def fitting(s: RunSpec, gpu: Gpu, tokens: float | None = None, typed: TypedSettings = PLAIN) -> list[Change]:
    """Return the combinations of up to three changes with which the run fits, the cheapest first.

    The same training is preferred to a different one, the same number of GPUs to more, then what is
    fastest. For the arguments see `changes`.
    """
    found = []
    for together in (1, 2, 3):
        for change in changes(s, gpu, together, tokens, typed):
            if change.fits(gpu):
                found.append(change)
    return sorted(found, key=lambda change: (*change.cost, len(change.overrides)))


def cheapest(s: RunSpec, gpu: Gpu, typed: TypedSettings = PLAIN) -> Change | None:
    """Return the first of `fitting`, or None."""
    return next(iter(fitting(s, gpu, typed=typed)), None)
