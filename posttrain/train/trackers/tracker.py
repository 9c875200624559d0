"""What a tracker is told of a run. No tracker library here."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from posttrain.config import yaml_file
from posttrain.config.trial_names import swept_keys, swept_values
from posttrain.errors import UserError
from posttrain.utils import rundir

MULTIRUN = "multirun.yaml"  # in a sweep's directory
OVERRIDES = ".hydra/overrides.yaml"  # in a run directory
RUN_ID = re.compile(r"[a-z0-9]{4,64}")


@dataclass(frozen=True)
class Resumed:
    """The part of a run before it was resumed.

    Attributes:
        step: that it is resumed after; what an earlier process has recorded later was lost with it.
        points: what was recorded at that step.
        samples: the answers at that step.
    """

    step: int
    points: Sequence[dict[str, float]]
    samples: list[dict[str, str]]


@dataclass(frozen=True)
class TrackedRun:
    """A run that begins or continues.

    Attributes:
        directory: the run's.
        name: what it is called.
        config: the frozen configuration.
        group: the sweep that it is a trial of; None: of none.
        swept: key -> the trial's value of what varies in that sweep.
        resumed: None: it begins.
    """

    directory: Path
    name: str
    config: dict[str, Any]
    group: str | None = None
    swept: Mapping[str, Any] = field(default_factory=dict)
    resumed: Resumed | None = None

    @property
    def recorded_config(self) -> dict[str, Any]:
        """The configuration, with what varies in the sweep once more as `swept`."""
        return {**self.config, "swept": dict(self.swept)} if self.swept else self.config

    def known_id(self, name: str) -> str | None:
        """The id that a resumed run has in a tracker, from a file of the run directory; None: it has none yet."""
        if self.resumed is None:
            return None
        run_id = rundir.object_if_any(self.directory, name).get("id")
        return run_id if isinstance(run_id, str) and RUN_ID.fullmatch(run_id) else None


def sweep_of(run_dir: Path) -> tuple[str | None, dict[str, Any]]:
    """The name of the sweep that a run is a trial of, and key -> its value of what varies there, as Hydra records them.

    None and nothing for a run by itself.
    """
    sweep = run_dir.absolute().parent
    if not rundir.is_file(sweep, MULTIRUN) or not rundir.is_file(run_dir, OVERRIDES):
        return None, {}
    hydra = yaml_file.parse_text(rundir.read_text(sweep, MULTIRUN), sweep / MULTIRUN)["hydra"]
    own = yaml_file.parse_text(rundir.read_text(run_dir, OVERRIDES), run_dir / OVERRIDES)
    swept = swept_keys(hydra["overrides"]["task"], hydra["sweeper"].get("params"))
    return sweep.name, swept_values(own, swept)


class Tracker:
    """Where numbers go besides metrics.jsonl.

    Attributes:
        notice: what the person at the keyboard should know, once it has started; empty: nothing.
    """

    notice = ""

    def check(self) -> None:
        """See before anything is loaded that the tracker can be written to.

        Raises:
            UserError: it can't.
        """

    def start(self, run: TrackedRun) -> None:
        """Begin the run with its configuration, or continue it."""

    def log(self, step: int, values: dict[str, float]) -> None:
        """Record `values` at `step`."""

    def table(self, step: int, name: str, rows: list[dict[str, str]]) -> None:
        """Record texts at `step`: rows of the same keys."""

    def finish(self, summary: dict[str, Any]) -> str | None:
        """End the run; returns where its record is, in words, if a person should know."""


def require(package: str, extra: str) -> None:
    """See that an extra's package is installed; nothing is imported.

    Raises:
        UserError: it isn't.
    """
    if find_spec(package) is None:
        raise UserError(f"logger={extra}: {package} is not installed; run `uv sync --extra {extra}`")
