"""Read runs from their directories: their configuration, state and results."""

import json
import math
import shlex
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeGuard

from posttrain.config import frozen, yaml_file
from posttrain.config.trial_names import flatten
from posttrain.errors import UserError
from posttrain.utils import rundir, working

READING = "reading the runs"  # a phase
MOST_CURVES = 500  # of a run; there are some 40
# What a run reads -> parts of the configuration that name it.
CONFIGURED_BY = {"data": ("data.",), "template": ("template.", "model."), "weights": ("model.",)}
LARGEST = 1e300  # of a number that is shown; differences of such are finite as well


@dataclass
class Trial:
    """One run directory.

    Attributes:
        name: its path below the report's directory, or its own name if it is that directory.
        path: where it is.
        config: the resolved configuration, flat: `optimizer.lr` -> 1e-4.
        overrides: of the command line, as given to Hydra; None where Hydra left no record.
        state: running, finished, pruned, failed or stopped; `killed` where it says running and its command is gone,
            `unknown` without status.json, `damaged` where one of its files can't be read.
        error: why it failed, was stopped or has stopped early; empty otherwise.
        summary: the numbers of summary.json; empty until the run has finished.
        series: metric -> [(step, value), ...] by step, from metrics.jsonl.
        samples: the dictionaries of samples.json: prompt, reference, before, after.
        answers: prompt -> [(step, answer), ...] by step, from samples.jsonl.
        inputs: digests of what it read besides its configuration; see posttrain.spec.inputs.
        started: seconds since the epoch, of the last start; 0: it doesn't say.
        ended: as `started`.
        spec: of spec.yaml, what the run decided from its configuration and the machine.
        group: of the trials that it can be compared with, 0 for the latest; see `set_groups`.
    """

    name: str
    path: Path
    config: dict[str, Any]
    overrides: list[str] | None = None
    state: str = "unknown"
    error: str = ""
    summary: dict[str, Any] = field(default_factory=dict)
    series: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    answers: dict[str, list[tuple[int, str]]] = field(default_factory=dict)
    inputs: dict[str, Any] = field(default_factory=dict)
    started: float = 0.0
    ended: float = 0.0
    spec: dict[str, Any] = field(default_factory=dict)
    group: int = 0

    @property
    def command(self) -> str | None:
        """The command that runs this trial again, alone and to its end."""
        if not self.overrides:
            return None
        own = [text for text in self.overrides if not text.lstrip("+~").startswith("sweep.")]
        return shlex.join(["python", "-m", "posttrain", *own])

    @cached_property
    def choices(self) -> dict[str, str]:
        """The keys of the command line and the text of their values: `peft` -> `lora`, `optimizer.lr` -> `1e-4`."""
        choices = {}
        for override in self.overrides or ():
            key, _, text = override.lstrip("+~").partition("=")
            choices[key] = text
        return choices

    @property
    def groups(self) -> dict[str, Any]:
        """Group -> the file that was chosen, on the command line or by default; empty where Hydra left no record."""
        return part_of(part_of(self._hydra, "runtime"), "choices")

    @property
    def file(self) -> str | None:
        """The YAML file that the command line named, with which the run's settings began; None: it named none."""
        name = part_of(self._hydra, "job").get("name")
        return name if isinstance(name, str) and name.endswith((".yaml", ".yml")) else None

    @cached_property
    def _hydra(self) -> dict[str, Any]:
        """What Hydra recorded of the command, its overrides aside; empty where it left no record."""
        return part_of(_yaml(self.path, ".hydra/hydra.yaml", {}), "hydra")

    @property
    def seconds(self) -> float:
        """How long it took. Of a resumed run, whose last start alone is known, at least the time of training."""
        whole = 0.0
        if self.started and self.ended:
            whole = self.ended - self.started
        return max(whole, number_of(self.summary, "train_seconds", 0.0))

    @property
    def tokens(self) -> int:
        """How many it has trained on so far."""
        count = self.summary.get("tokens")
        if is_number(count):
            return int(count)
        last = self.last("tokens")
        if last is None:
            return 0
        return int(last[1])

    @property
    def gpus(self) -> int | None:
        """How many it ran on; None: it doesn't say."""
        world = part_of(self.spec, "processes").get("world")
        if not is_number(world) or "device" not in self.spec:
            return None
        if self.spec["device"] != "cuda":
            return 0
        return int(world)

    @property
    def counted(self) -> dict[str, Any]:
        """What was counted in its data; empty until it has ended."""
        return part_of(self.summary, "data")

    @property
    def export(self) -> Path | None:
        """The Hugging Face directory that it left: the adapter or the whole model."""
        for name in ("adapter", "hf"):
            if rundir.is_folder(self.path, name):
                return self.path / name
        return None

    def score(self, metric: str) -> float:
        """Its value of `metric`, infinite if it has none, so that sorting puts it last."""
        return number_of(self.summary, metric, math.inf)

    def last(self, curve: str) -> tuple[int, float] | None:
        """The last point of a curve; None: it has no such curve."""
        points = self.series.get(curve)
        if not points:
            return None
        return points[-1]


def read_trials(directory: Path) -> list[Trial]:
    """Return the runs in `directory`, by name.

    The directory is a run itself, or runs are below it at any depth.

    Raises:
        UserError: there is no such directory, or no run in it; or it is a run itself, of which a file can't be read.
    """
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory; give the directory of a sweep or of a run")
    try:
        run_directories = sorted(_run_directories(directory))
    except OSError as error:  # nested beyond the length that a path may have, or not for us to read
        raise UserError(f"{str(error.filename)[:200]}: can't be read: {error.strerror}") from None
    if not run_directories:
        raise UserError(f"{directory}: no run in it (a run's directory has a config.yaml and a status.json)")
    trials = []
    for path in working.counted(run_directories, READING, len(run_directories)):
        try:
            trials.append(read_trial(path, directory))
        except UserError as error:
            if path == directory:
                raise
            trials.append(Trial(str(path.relative_to(directory)), path, {}, state="damaged", error=str(error)))
    set_groups(trials)
    return trials


def set_groups(trials: list[Trial]) -> None:
    """Number the groups of trials whose losses can be compared, the latest first.

    Validated on the same rows; and where one configuration means several files, since a file was replaced, made with
    the same ones. A trial that doesn't say what it read is left in the first group.
    """
    versions: dict[tuple[str, str], list[object]] = {}
    kinds: dict[tuple[object, ...], list[Trial]] = {}
    known = [trial for trial in trials if trial.inputs]
    for trial in sorted(known, key=lambda trial: trial.started):
        kind: list[object] = [trial.inputs.get("validation")]
        for name, parts in CONFIGURED_BY.items():
            own = {key: value for key, value in trial.config.items() if key.startswith(parts)}
            seen = versions.setdefault((name, json.dumps(own, sort_keys=True)), [])
            digest = trial.inputs.get(name)
            if digest not in seen:
                seen.append(digest)
            kind.append(seen.index(digest))
        kinds.setdefault(tuple(kind), []).append(trial)
    latest_first = sorted(kinds.values(), key=lambda group: group[-1].started, reverse=True)
    for number, group in enumerate(latest_first):
        for trial in group:
            trial.group = number


def read_trial(path: Path, root: Path) -> Trial:
    """Read one run directory; what is missing, or being written at this moment, is left out.

    Raises:
        UserError: a file is not a plain one, is no YAML, or would fill the memory.
    """
    status: dict[str, Any] = _json(path, "status.json", {})
    samples: list[Any] = _json(path, "samples.json", [])
    overrides: list[Any] = _yaml(path, ".hydra/overrides.yaml", [])
    name = str(path.relative_to(root))
    if path == root:
        name = path.resolve().name
    state = str(status.get("state", "unknown"))
    error = str(status.get("error") or status.get("stopped_early") or "")
    if _is_gone(path, status):
        state = "killed"
        error = f"ended without a word; python -m posttrain --resume {shlex.quote(str(path))} continues it"
    return Trial(
        name=name,
        path=path,
        config=flatten(frozen.unescaped(_yaml(path, "config.yaml", {}))),
        overrides=list(map(str, overrides)) or None,
        state=state,
        error=error,
        summary=_json(path, "summary.json", {}),
        series=read_series(path),
        samples=[sample for sample in samples if isinstance(sample, dict)],
        answers=_answers(path),
        inputs=_json(path, "inputs.json", {}),
        started=number_of(status, "started", 0.0),
        ended=number_of(status, "ended", 0.0),
        spec=_yaml(path, "spec.yaml", {}),
    )


def _is_gone(path: Path, status: dict[str, Any]) -> bool:
    """Whether the command that ran here has ended without recording it; only its own machine can tell."""
    if status.get("state") != "running" or status.get("host") != socket.gethostname():
        return False
    return not rundir.is_in_use(path)


def _run_directories(directory: Path) -> Iterator[Path]:
    """Directories with a config.yaml and a status.json; they and links (`best`) are not entered."""
    left = [directory]
    while left:
        folder = left.pop()
        if (folder / "config.yaml").is_file() and (folder / "status.json").is_file():
            yield folder
            continue
        for child in folder.iterdir():
            if not child.is_symlink() and child.name not in (".hydra", "checkpoints", "logs") and child.is_dir():
                left.append(child)


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value of JSON is a number that can be shown: neither NaN nor an integer of hundreds of digits."""
    return isinstance(value, int | float) and abs(value) < LARGEST


def number_of(values: dict[str, Any], name: str, default: float) -> float:
    """A number of an object of JSON, `default` where it has none that can be shown."""
    value = values.get(name)
    if is_number(value):
        return value
    return default


def numbers_of(values: dict[str, Any]) -> dict[str, float]:
    """What of an object of JSON is a number that can be shown."""
    return {name: value for name, value in values.items() if is_number(value)}


def part_of(values: dict[str, Any], name: str) -> dict[str, Any]:
    """An object within an object of JSON, empty where there is none."""
    return _of_type(values.get(name), {})


def read_series(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """Return the numbers of a run's metrics.jsonl: name -> [(step, value), ...] by step.

    Of a step that a resumed run repeated, the last value counts. A last line that is still being
    written is skipped, and so are names beyond MOST_CURVES.
    """
    series: dict[str, dict[int, float]] = {}
    for point in _lines(run_dir, "metrics.jsonl"):
        for name, value in point.items():
            known = name in series or len(series) < MOST_CURVES
            if known and name != "step" and is_number(value):
                series.setdefault(name, {})[point["step"]] = value
    return {name: sorted(points.items()) for name, points in series.items()}


def _answers(run_dir: Path) -> dict[str, list[tuple[int, str]]]:
    """Answers during training by prompt."""
    by_prompt: dict[str, dict[int, str]] = {}
    for row in _lines(run_dir, "samples.jsonl"):
        if isinstance(row.get("prompt"), str):
            by_prompt.setdefault(row["prompt"], {})[row["step"]] = str(row.get("answer"))
    return {prompt: sorted(answers.items()) for prompt, answers in by_prompt.items()}


def _lines(run_dir: Path, name: str) -> Iterator[dict[str, Any]]:
    """The objects with a step in a file of one per line; other and half-written lines are skipped."""
    if not rundir.is_file(run_dir, name):
        return
    for line in rundir.read_text(run_dir, name, rundir.LONG, errors="replace").split("\n"):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and type(row.get("step")) is int:
            yield row


def _json[T](run_dir: Path, name: str, default: T) -> T:
    """The content of a file, or `default` if the content is not of its type.

    Raises:
        UserError: it is a link, or not a plain file.
    """
    try:
        content = rundir.read_json(run_dir, name)
    except (OSError, ValueError):
        return default
    return _of_type(content, default)


def _yaml[T](run_dir: Path, name: str, default: T) -> T:
    """As `_json`, for YAML.

    Raises:
        UserError: it is not a plain file, isn't YAML, or would fill the memory.
    """
    path = run_dir / name
    try:
        content = yaml_file.parse_text(rundir.read_text(run_dir, name), path)
    except (OSError, UnicodeDecodeError):
        return default
    return _of_type(content, default)


def _of_type[T](content: object, default: T) -> T:
    if isinstance(content, type(default)):
        return content
    return default
