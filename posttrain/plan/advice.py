"""What would make a run fit: single changes and combinations, by how much they cost."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from posttrain.plan.gpus import Gpu
from posttrain.plan.memory import GIB, Memory, memory
from posttrain.plan.setting import Setting
from posttrain.plan.shape import Adapters
from posttrain.plan.speed import speed


@dataclass(frozen=True)
class Change:
    """Another setting.

    Attributes:
        words: of the command line.
        what: it changes: "speed", "format" (8-bit products), "gpus" (more of them), "data" (rows get shorter) or
            "result" (another training).
        setting: with the change.
        memory: of the setting.
        slower: time of an epoch over that without the change.
    """

    words: tuple[str, ...]
    what: str
    setting: Setting
    memory: Memory
    slower: float

    @property
    def cost(self) -> tuple[int, int, float]:
        """What to sort by."""
        return KINDS.index(self.what), self.setting.world, self.slower

    def fits(self, gpu: Gpu) -> bool:
        """Whether the GPU has the memory."""
        return self.memory.needed <= gpu.memory_gib * GIB


KINDS = ("speed", "format", "gpus", "data", "result")  # the first are preferred
TENSOR = 1.1  # assumed, not measured: what tensor parallelism's communication costs inside a machine
Edit = tuple[str, tuple[str, ...], dict[str, Any]]


def edits(s: Setting, gpu: Gpu) -> Iterator[list[Edit]]:
    """Alternatives of which a combination takes one of each list at most: (kind, words, fields of Setting)."""
    sizes = [size for size in (8, 4, 2, 1) if size < s.micro_batch and s.micro_batch % size == 0]
    yield [("speed", (f"trainer.micro_batch_size={size}",), {"micro_batch": size}) for size in sizes]
    if s.recompute != "full":
        yield [("speed", ("trainer.recompute=full",), {"recompute": "full"})]
    if s.data_parallel * s.context > 1 and not s.distributed_optimizer and not s.fsdp:
        words = ("parallelism.distributed_optimizer=true",)
        yield [("speed", words, {"distributed_optimizer": True})]
    divided = []
    for size in (2, 4, 8):
        # Query heads and key groups are divided by the same rule as posttrain.check has for them.
        groups = s.shape.key * s.shape.heads // s.shape.query
        if size > s.tensor and s.shape.heads % size == 0 and groups % size == 0 and s.length % size == 0:
            world = max(s.world, size * s.pipeline * s.context)
            kind = "speed" if world == s.world and world % (size * s.pipeline * s.context) == 0 else "gpus"
            words = (f"parallelism.tensor_model_parallel_size={size}",)
            divided.append((kind, words, {"tensor": size, "world": world}))
    yield divided
    if s.packing and s.length >= 1024:
        half = int(s.length) // 2
        yield [("data", (f"trainer.seq_length={half}",), {"length": half})]
    if s.adapters is None:
        adapters = Adapters.of(s.shape, "LoRA", 16, "all-linear", s.transformer_engine)
        yield [("result", ("peft=lora",), {"adapters": adapters, "fused": True, "again": True})]
    if gpu.eight_bit and s.precision == "bf16" and replace(s, precision="fp8").eight_bit_base:
        yield [("format", ("precision=fp8",), {"precision": "fp8"})]


def changes(s: Setting, gpu: Gpu, together: int = 1) -> list[Change]:
    """Every combination of `together` changes that is possible, the cheapest first."""
    found = []
    gpu = gpu if gpu.tflops else replace(gpu, tflops=989.0)  # any rate: ratios are what counts
    tokens = s.global_batch * s.length
    plain = speed(s, gpu, tokens).step_s
    for lists in itertools.combinations(list(edits(s, gpu)), together):
        for chosen in itertools.product(*lists):
            fields = {name: value for _, _, more in chosen for name, value in more.items()}
            other = replace(s, **fields)
            if other.precision == "fp8" and not other.eight_bit_base:
                continue
            if other.global_batch % (other.micro_batch * other.data_parallel):
                continue
            took = speed(other, gpu, other.global_batch * other.length).step_s
            slower = took / plain * s.length / other.length if took and plain else 1.0
            slower *= TENSOR if other.tensor > s.tensor else 1.0
            what = max((kind for kind, _, _ in chosen), key=KINDS.index)
            words = tuple(word for _, more, _ in chosen for word in more)
            found.append(Change(words, what, other, memory(other), slower))
    return sorted(found, key=lambda change: change.cost)


def cheapest(s: Setting, gpu: Gpu) -> Change | None:
    """The cheapest change, or combination of up to three, with which the run fits; None: there is none here.

    The same training is preferred to another one, the same number of GPUs to more, then what is fastest.
    """
    fitting = [change for count in (1, 2, 3) for change in changes(s, gpu, count) if change.fits(gpu)]
    return min(fitting, key=lambda change: (*change.cost, len(change.words)), default=None)
