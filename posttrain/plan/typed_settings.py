"""What a plan has to know of the settings as they were typed, so that the overrides that it advises change the run."""

from collections.abc import Collection
from dataclasses import dataclass, field

from omegaconf import DictConfig

from posttrain.spec.parallel_sizes import KEYS
from posttrain.spec.run_spec import RunSpec

PROCESSES = "nproc_per_node"  # a key of `parallelism`
DIVIDED_STATE = "distributed_optimizer"
SPLIT = frozenset({*KEYS.values(), DIVIDED_STATE})


@dataclass(frozen=True)
class TypedSavings:
    """What was typed of how activations are kept, before `parallelism=auto` has chosen.

    Attributes:
        recompute, offload_layers: as in `trainer`.
    """

    recompute: str
    offload_layers: int | None


@dataclass(frozen=True)
class TypedSettings:
    """What was typed, or stood in a file, where the run alone doesn't say it.

    Attributes:
        savings: what `parallelism=auto` has chosen from; None: it has not chosen. Beside a change it would choose
            again, from a given size on; another file of `parallelism` would take it away.
        chosen_micro_batch: whether `trainer.micro_batch_size=auto` has chosen, which it would again.
        pinned: keys that are set beside the file of `parallelism`: another file leaves them as they are.
        processes: on each machine, as set; None: one for each GPU.
        gpus: of each machine; None: as many as there are processes.
        fewest: whether nothing says how many there are, and the run has as few as its sizes need.
    """

    savings: TypedSavings | None = None
    chosen_micro_batch: bool = False
    pinned: Collection[str] = field(default_factory=frozenset)
    processes: int | None = None
    gpus: int | None = None
    fewest: bool = False

    @classmethod
    def of_auto(cls, cfg: DictConfig, gpus: int) -> "TypedSettings":
        """Of a run whose split `parallelism=auto` chooses: that file leaves all sizes open, so those given are pinned.

        Args:
            cfg: as composed.
            gpus: of each machine.
        """
        chosen = cfg.parallelism
        pinned = {key for key in KEYS.values() if chosen[key] > 1}
        if chosen[DIVIDED_STATE]:
            pinned.add(DIVIDED_STATE)
        if chosen[PROCESSES] is not None:
            pinned.add(PROCESSES)
        savings = TypedSavings(cfg.trainer.recompute, cfg.trainer.offload_layers)
        return cls(savings, False, pinned, chosen[PROCESSES], gpus)

    @property
    def pins_split(self) -> bool:
        """Whether another file of `parallelism` would leave some of the split as it is."""
        return not SPLIT.isdisjoint(self.pinned)

    @property
    def chosen_split(self) -> bool:
        """Whether `parallelism=auto` has chosen the split and what is computed again."""
        return self.savings is not None

    @property
    def chooses(self) -> bool:
        """Whether something would be chosen again beside a change."""
        return self.chosen_split or self.chosen_micro_batch

    def processes_override(self, setting: RunSpec, other_file: bool) -> list[str]:
        """What starts the processes of a run, where its other overrides don't.

        Args:
            setting: the run.
            other_file: whether these choose another file of `parallelism`.
        """
        local = setting.world // setting.machines
        key = f"parallelism.{PROCESSES}={local}"
        if other_file and PROCESSES not in self.pinned:
            started = self.gpus or local
            if self.fewest:
                started = max(1, setting.fewest // setting.machines)
            return [key] if started != local else []
        if self.processes is None or self.processes == local:
            return []
        return [key]
