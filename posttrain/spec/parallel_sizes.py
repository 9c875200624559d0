"""How the processes of a run divide its work and its model, and what can't be divided so."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig

from posttrain.models.families.family import ModelFamily

# Model-parallel size -> its key in the config group `parallelism`.
KEYS = {
    "tensor": "tensor_model_parallel_size",
    "pipeline": "pipeline_model_parallel_size",
    "context": "context_parallel_size",
    "expert": "expert_model_parallel_size",
}

FARTHEST = 64  # processes of a machine, where nothing says how many it has room for


@dataclass(frozen=True, kw_only=True)
class ParallelSizes:
    """Processes, and the groups that they form.

    Attributes:
        world: processes of the run.
        tensor, pipeline, context, expert: model-parallel sizes.
    """

    world: int
    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    expert: int = 1

    @property
    def model_parallel(self) -> int:
        """Processes that hold one copy of the model between them."""
        return self.tensor * self.pipeline * self.context

    @property
    def data_parallel(self) -> int:
        """Processes that see different data."""
        return max(1, self.world // self.model_parallel)

    @property
    def fewest(self) -> int:
        """The fewest processes that the model-parallel sizes need."""
        return self.pipeline * max(self.tensor * self.context, self.expert)

    @property
    def whole_in_one(self) -> bool:
        """Whether one process sees all layers and whole sequences, as answers during training need."""
        return self.pipeline == 1 and self.context == 1

    @property
    def conversation_multiple(self) -> int:
        """What a conversation is padded to a multiple of: context parallelism gives each process two pieces of it."""
        return 2 * self.context if self.context > 1 else 1

    @property
    def micro_batch_multiple(self) -> int:
        """What a micro-batch is padded to a multiple of: tensor-parallel processes divide the tokens too."""
        return self.tensor * self.conversation_multiple


@dataclass(frozen=True)
class ProcessCount:
    """How many processes each machine of a run starts, and why.

    Attributes:
        nproc: processes on each machine.
        key: the setting of that number.
        source: where it comes from, in words.
        most: that is possible on a machine.
    """

    nproc: int
    key: str
    source: str
    most: int = FARTHEST

    def nearest(self, fits: Callable[[int], bool]) -> int | None:
        """The largest smaller number that `fits`, else the smallest larger one; None: there is none."""
        for nproc in itertools.chain(range(self.nproc - 1, 0, -1), range(self.nproc + 1, self.most + 1)):
            if fits(nproc):
                return nproc
        return None


def model_parallel_sizes(cfg: DictConfig) -> dict[str, int]:
    """The model-parallel sizes of a configuration, by their names in `ParallelSizes`."""
    return {name: cfg.parallelism[key] for name, key in KEYS.items()}


@dataclass(frozen=True)
class Counts:
    """What parallel sizes have to divide in a model; None: not known, or there is none.

    Attributes:
        heads: attention heads.
        groups: key-value groups.
        experts: of a layer.
    """

    heads: int | None
    groups: int | None
    experts: int | None = None

    @classmethod
    def from_config(cls, family: ModelFamily, config: Mapping[str, Any]) -> "Counts":
        """Read the fields of a config.json."""
        return cls(
            heads=family.value("heads", config),
            groups=family.value("groups", config),
            experts=family.value("experts", config),
        )

    def undivided(self, sizes: ParallelSizes) -> Iterator[tuple[str, int, str]]:
        """Yield what the sizes don't divide: its name, its number, the name of the size."""
        for name, count, size in (
            ("attention heads", self.heads, "tensor"),
            ("key-value groups", self.groups, "tensor"),
            ("experts", self.experts, "expert"),
        ):
            if count is not None and count % getattr(sizes, size):
                yield name, count, size
