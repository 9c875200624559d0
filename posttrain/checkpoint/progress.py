"""What a run's later parts must know of its earlier ones, kept in each checkpoint."""

import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from posttrain.checkpoint import directories
from posttrain.errors import UserError
from posttrain.utils import rundir
from posttrain.utils.atomic_files import write_json

FILE = "progress.json"


@dataclass
class Progress:
    """Totals over all parts of a run.

    Attributes:
        supervised_tokens, tokens: that have been trained on, and that were in the batches.
        seconds: in training steps.
        train_loss: mean over the last logged steps; see `trainer.log_interval`.
        val_loss_before: before the first step.
        samples: answers before the first step.
        losses: the last logged ones, by which a spike is measured.
        rollbacks: see posttrain/train/rollback.py.
        inputs: see posttrain/checkpoint/fingerprints.py.
        rows: packed sequences of an epoch.
        digests: of what the configuration names, as the command found it; see posttrain/spec/inputs.py.
        window: sums of metrics since the last logged step; see posttrain/train/loss_window.py.
        val_loss: after the last step, if there was a validation then.
        validations: (step, loss) of every validation after a step, the oldest first.
        temporary: whether this checkpoint goes when the next one is written, unless it is the best then.
        skipped: damaged checkpoints that were passed over at this start; not kept.
    """

    supervised_tokens: int = 0
    tokens: int = 0
    seconds: float = 0.0
    train_loss: float | None = None
    val_loss_before: float | None = None
    samples: list[dict[str, str]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    rollbacks: list[dict[str, Any]] = field(default_factory=list)
    inputs: dict[str, str] = field(default_factory=dict)
    rows: int = 0
    digests: dict[str, str] = field(default_factory=dict)
    window: dict[str, float] = field(default_factory=dict)
    val_loss: float | None = None
    validations: list[tuple[int, float]] = field(default_factory=list)
    temporary: bool = False
    skipped: list[str] = field(default_factory=list)

    def write(self, checkpoint: Path) -> None:
        """Into a checkpoint that is being written."""
        values = asdict(self)
        del values["skipped"]
        write_json(checkpoint / FILE, values)

    def read(self, checkpoint: Path) -> None:
        """From a checkpoint that was loaded."""
        try:
            values = rundir.read_json(checkpoint, FILE)
        except (OSError, ValueError) as error:
            raise UserError(f"{checkpoint / FILE}: can't be read: {error}") from None
        if not isinstance(values, dict):
            raise UserError(f"{checkpoint / FILE}: can't be read: it is no JSON object")
        for item in fields(self):
            default = getattr(self, item.name)
            value = values.get(item.name, default)
            expected = type(default) if isinstance(default, list | dict) else int | float | None
            if not isinstance(value, expected):
                raise UserError(f"{checkpoint / FILE}: can't be read: `{item.name}` has the wrong type")
            setattr(self, item.name, value)
        try:
            self.validations = [parse_validation(*pair) for pair in self.validations]
        except (TypeError, ValueError, OverflowError):
            raise UserError(f"{checkpoint / FILE}: can't be read: `validations` has the wrong type") from None


def parse_validation(step: int, loss: float | None) -> tuple[int, float]:
    """A pair of `validations` as JSON has it, which has null in the place of NaN."""
    return int(step), math.nan if loss is None else float(loss)


def validation_loss(checkpoint: Path) -> float | None:
    """Of the weights in a checkpoint, where they were validated before it was written."""
    loss = rundir.object_if_any(checkpoint, FILE).get("val_loss")
    return loss if isinstance(loss, float) else None


def rows(checkpoint: Path) -> int | None:
    """Packed sequences of an epoch of the run that saved; None: it doesn't say."""
    count = rundir.object_if_any(checkpoint, FILE).get("rows")
    return count if isinstance(count, int) and count > 0 else None


def digests(checkpoint: Path) -> dict[str, object]:
    """Digests of what the configuration of the run that saved names; empty: it doesn't say."""
    found = rundir.object_if_any(checkpoint, FILE).get("digests")
    return found if isinstance(found, dict) else {}


def is_temporary(checkpoint: Path) -> bool:
    """See Progress."""
    return rundir.object_if_any(checkpoint, FILE).get("temporary") is True


def best(root: Path, hashes: bool = False) -> Path | None:
    """The whole checkpoint below `root` with the lowest validation loss, the first of equal ones; None: none has one.

    Args:
        root: of the checkpoints.
        hashes: whether its content is compared with what was written.
    """
    found = []
    for checkpoint in directories.checkpoints(root):
        loss = validation_loss(checkpoint)
        if loss is not None:
            found.append((loss, directories.step_of(checkpoint), checkpoint))
    for _, _, checkpoint in sorted(found):
        if directories.problem(checkpoint, hashes) is None:
            return checkpoint
    return None
