"""Read runs from their directories: what was asked for, how it went, what came out."""

import json
import math
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from posttrain import yaml_file
from posttrain.errors import UserError
from posttrain.sweep.names import flatten, is_place

# What trials are ranked by: the first that any of them has. Smaller is better.
METRICS = ("val_loss_after", "train_loss")


@dataclass
class Trial:
    """One run directory.

    Attributes:
        name: its path below the report's directory, or its own name if it is that directory.
        path: where it is.
        config: the resolved configuration, flat: `optimizer.lr` -> 1e-4.
        overrides: what the command line said, as given to Hydra; None where Hydra left no record.
        state: running, finished, pruned, failed or stopped; `unknown` without status.json.
        error: why it failed or was stopped; empty otherwise.
        summary: the numbers of summary.json; empty until the run has finished.
        series: metric -> [(step, value), ...] by step, from metrics.jsonl.
        samples: the dictionaries of samples.json: prompt, reference, before, after.
        answers: prompt -> [(step, answer), ...] by step, from samples.jsonl.
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

    @property
    def command(self) -> str | None:
        """The command that runs this trial again, alone and to its end."""
        own = [override for override in self.overrides or () if not override.lstrip("+~").startswith("sweep.")]
        return self.overrides and shlex.join(["python", "-m", "posttrain", *own])

    @property
    def export(self) -> Path | None:
        """The Hugging Face directory that it left: the adapter or the whole model."""
        return next((self.path / name for name in ("adapter", "hf") if (self.path / name).is_dir()), None)

    def score(self, metric: str) -> float:
        """Its value of `metric`, infinite if it has none, so that sorting puts it last."""
        value = self.summary.get(metric)
        return value if isinstance(value, int | float) and math.isfinite(value) else math.inf


def read_trials(directory: Path) -> list[Trial]:
    """Return the runs in `directory`, best first: it is a run itself, or runs are below it at any depth.

    Raises:
        UserError: there is no such directory, or no run in it.
    """
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory; give the directory of a sweep or of a run")
    found = sorted(_run_directories(directory))
    if not found:
        raise UserError(f"{directory}: no run in it (a run's directory has a config.yaml and a status.json)")
    trials = [read_trial(path, directory) for path in found]
    metric = ranked_by(trials)
    return sorted(trials, key=lambda trial: trial.score(metric))  # stable: by name where equal


def read_trial(path: Path, root: Path) -> Trial:
    """Read one run directory; what is missing, or being written at this moment, is left out."""
    status = _json(path / "status.json", {})
    samples = _json(path / "samples.json", [])
    overrides = [str(word) for word in _yaml(path / ".hydra" / "overrides.yaml", [])]
    return Trial(
        name=str(path.relative_to(root)) if path != root else path.resolve().name,
        path=path,
        config=flatten(_yaml(path / "config.yaml", {})),
        overrides=overrides or None,
        state=str(status.get("state", "unknown")),
        error=str(status.get("error") or ""),
        summary=_json(path / "summary.json", {}),
        series=read_series(path / "metrics.jsonl"),
        samples=[sample for sample in samples if isinstance(sample, dict)],
        answers=_answers(path / "samples.jsonl"),
    )


def ranked_by(trials: list[Trial]) -> str:
    """Return the metric that ranks these trials."""
    return next((m for m in METRICS if any(math.isfinite(trial.score(m)) for trial in trials)), METRICS[0])


def best_trial(trials: list[Trial]) -> Trial | None:
    """Return the finished trial with the smallest metric."""
    metric = ranked_by(trials)
    finished = [trial for trial in trials if trial.state == "finished" and math.isfinite(trial.score(metric))]
    return min(finished, key=lambda trial: trial.score(metric), default=None)


def differing(trials: list[Trial]) -> list[str]:
    """Return the configuration keys whose values are not the same in all trials.

    Where a whole group was swapped, keys that follow from it are many; they are all told.
    """
    keys = dict.fromkeys(key for trial in trials for key in trial.config if not is_place(key))
    return [key for key in keys if len({json.dumps(trial.config.get(key)) for trial in trials}) > 1]


def _run_directories(directory: Path):
    """Directories with a config.yaml and a status.json, not looking into them, nor through links (`best`)."""
    if (directory / "config.yaml").is_file() and (directory / "status.json").is_file():
        yield directory
        return
    for child in directory.iterdir():
        if child.is_dir() and not child.is_symlink() and child.name not in (".hydra", "checkpoints", "logs"):
            yield from _run_directories(child)


def read_series(path: Path) -> dict[str, list[tuple[int, float]]]:
    """The numbers of metrics.jsonl by name and step; a step that a resumed run did again counts as done last.

    A last line that is still being written is skipped.
    """
    series: dict[str, dict[int, float]] = {}
    for point in _lines(path):
        for name, value in point.items():
            if isinstance(value, int | float) and math.isfinite(value) and name != "step":
                series.setdefault(name, {})[point["step"]] = value
    return {name: sorted(points.items()) for name, points in series.items()}


def _answers(path: Path) -> dict[str, list[tuple[int, str]]]:
    """Answers during training by prompt."""
    found: dict[str, dict[int, str]] = {}
    for row in _lines(path):
        if isinstance(row.get("prompt"), str):
            found.setdefault(row["prompt"], {})[row["step"]] = str(row.get("answer"))
    return {prompt: sorted(answers.items()) for prompt, answers in found.items()}


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects with a step in a file of one per line; what else is there, or half written, is left out."""
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else ():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and type(row.get("step")) is int:
            yield row


def _json(path: Path, default: Any) -> Any:
    """The content of a file, where it is of the kind of `default`."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return default
    return found if isinstance(found, type(default)) else default


def _yaml(path: Path, default: Any) -> Any:
    """As `_json`; by the safe loader, whose C version, where PyYAML has it, is 10 times as fast.

    Raises:
        UserError: it isn't YAML, or would fill the memory.
    """
    try:
        text = path.read_text(encoding="utf-8")
        yaml_file.check(text, path)
        found = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (OSError, UnicodeDecodeError):
        return default
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    return found if isinstance(found, type(default)) else default
