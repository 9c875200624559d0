"""What may be set in a file and what on the command line alone.

A file of a configuration may come from anybody; the words of a command line are the user's own. What decides where a
run connects to, what it sends, which commands it runs and where it writes is taken from those words, and from the
environment that torchrun and Slurm give. `python -m posttrain.config.policy` prints the tables of docs/security.md.
"""

import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, ListConfig, OmegaConf

from posttrain.errors import UserError

PACKAGE = Path(__file__).resolve().parents[1]
# The configuration that is shipped: in a wheel inside the package, in a checkout beside it.
SHIPPED = next(d for d in (PACKAGE / "conf", PACKAGE.parent / "conf") if d.is_dir())


CONTROL = re.compile(r"[\x00-\x1f\x7f]")  # what ends a line, or a word of a script


@dataclass(frozen=True)
class Rule:
    """Keys, and what is done with them.

    Attributes:
        keys: key paths; `*` stands for any text, and a key stands for all below it as well.
        why: what they decide, to go on after "...: ".
    """

    keys: tuple[str, ...]
    why: str


COMMAND_LINE = (
    Rule(
        ("launch.nnodes", "launch.node_rank", "launch.master_addr", "launch.master_port"),
        "says which machines a run trusts: ranks unpickle what their peers send",
    ),
    Rule(("launch.submit",), "sends the run to a cluster"),
    Rule(("cache_dir",), "is written to, outside of the run directory (or the environment's POSTTRAIN_CACHE)"),
    Rule(
        ("logger.*.entity", "logger.*._args_"),
        "says to whom a run is sent (or the environment's WANDB_ENTITY, or a file chosen with logger=)",
    ),
    Rule(("preview.out", "preview.html", "evaluate.out"), "is written to, outside of the run directory"),
    Rule(("convert",), "says what is written where, and what is published"),
    Rule(("hydra",), "is Hydra's own: commands, log handlers, directories, the mode, callbacks, the search path"),
)

RESOURCES = (
    "partition", "account", "qos", "constraint", "nodes", "gpus_per_node", "cpus_per_node", "mem_gb", "time",
    "signal_delay_s", "max_requeues", "array_parallelism", "poll_s",
)  # fmt: skip

FILES = (
    Rule(
        tuple(f"hydra.launcher.{name}" for name in RESOURCES),
        "what a Slurm job asks for",
    ),
    Rule(
        (
            "hydra.sweeper.params", "hydra.sweeper.n_trials", "hydra.sweeper.n_jobs", "hydra.sweeper.direction",
            "hydra.sweeper.max_failure_rate", "hydra.sweeper.max_batch_size", "hydra.sweeper.sampler",
        ),
        "a grid or search, over keys that a file may set; samplers are Optuna's",
    ),
)  # fmt: skip

# Groups whose file may be one's own: chosen on the command line, it is taken at its word about its own part.
CHOSEN = ("hydra.launcher", "hydra.sweeper", "logger")

MOST_TRIALS = 10_000  # of a search space in a file; Hydra lists all of them before the first begins

SEARCH_PATH = "hydra.searchpath"

# What Hydra fills in itself.
FILLED_IN = (
    "hydra.overrides", "hydra.runtime.version", "hydra.runtime.version_base", "hydra.runtime.cwd",
    "hydra.runtime.config_sources", "hydra.runtime.choices", "hydra.job.override_dirname", "hydra.job.config_name",
)  # fmt: skip


def rule_of(key: str) -> Rule | None:
    """The rule that keeps `key` out of files; None: a file may set it."""
    if _below(key, (name for rule in FILES for name in rule.keys)):
        return None
    return next((rule for rule in COMMAND_LINE if _below(key, rule.keys)), None)


def check(
    cfg: DictConfig, words: list[str], files: list[Path], compose: Callable[[list[str]], tuple[DictConfig, list[Path]]]
) -> None:
    """Refuse a configuration in which a file has set what is the command line's alone.

    Args:
        cfg: composed, with `hydra`, its interpolations as they are written.
        words: overrides of the command line.
        files: that took part and are not shipped.
        compose: words -> the configuration of those and of the shipped files, and other files that took part.

    Raises:
        UserError: naming the key and the files.
    """
    told = ", ".join(str(path) for path in files)
    taken = [str(word) for kind in ("hydra", "task") for word in cfg.hydra.overrides[kind]]
    if sorted(taken) != sorted(words):
        raise UserError(f"hydra.overrides: are the words of the command line, a file can't add any ({told})")
    parsed = OverridesParser.create().parse_overrides(words)
    ruled = [item for item in parsed if _is_ruled(item)]
    own, others = compose([_forced(item) for item in ruled if not _of_chosen(item)])
    if others:
        raise UserError(f"{others[0]}: sets what is taken from the command line alone")
    chosen, _ = compose([_forced(item) for item in ruled if _of_chosen(item) or _dotted(item) == SEARCH_PATH])
    found, expected, of_chosen = flat(cfg), flat(own), flat(chosen)
    for key in sorted(found.keys() | expected.keys() | of_chosen.keys()):
        rule = rule_of(key)
        if rule is None or _below(key, FILLED_IN):
            continue
        allowed = of_chosen if _below(key, CHOSEN) else expected
        if found.get(key) != allowed.get(key):
            raise UserError(f"{key}: {rule.why}; it is taken from the command line, and from no file ({told})")
    _check_space(found, of_chosen, told)


def _check_space(found: dict[str, Any], allowed: dict[str, Any], files: str) -> None:
    """A search space becomes words of each trial's command line: those about what is the command line's are not."""
    space, points = "hydra.sweeper.params", 1
    for key, value in found.items():
        if not _below(key, (space,)) or value is None or allowed.get(key) == value:
            continue
        name = key.removeprefix(f"{space}.")
        swept = OverridesParser.create().parse_override(f"{name}={value}")
        if swept.is_discrete_sweep():
            points *= sum(1 for _ in itertools.islice(swept.sweep_iterator(), MOST_TRIALS + 1))
        if points > MOST_TRIALS:
            raise UserError(f"{space}: a grid of more than {MOST_TRIALS} trials ({files})")
        if swept.package is not None or _is_ruled(swept) or rule_of(_dotted(swept)):
            raise UserError(f"{space}: {name}: is taken from the command line, and from no file ({files})")


def flat(cfg: DictConfig) -> dict[str, Any]:
    """Key path -> value as it is written; lists and empty mappings are values.

    Trackers are resolved: a whole one may be an interpolation.
    """
    written = dict(_leaves(OmegaConf.to_container(cfg, resolve=False), ""))
    if not OmegaConf.select(cfg, "logger"):
        return written
    return written | dict(_leaves(OmegaConf.to_container(cfg.logger, resolve=True), "logger"))


def _leaves(node: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict) and node:
        for key, value in node.items():
            yield from _leaves(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, node


def texts(node: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """(key path, text) of every text at or below `node`, as it is written; names of keys are texts as well."""
    if isinstance(node, DictConfig | ListConfig):
        node = OmegaConf.to_container(node, resolve=False)
    if isinstance(node, str):
        yield path, node
    elif isinstance(node, dict):
        for key, value in node.items():
            where = f"{path}.{key}" if path else str(key)
            yield where, str(key)
            yield from texts(value, where)
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from texts(value, f"{path}[{index}]")


def _below(key: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(key, pattern) or fnmatchcase(key, f"{pattern}.*") for pattern in patterns)


def _dotted(word: Override) -> str:
    return word.key_or_group.replace("/", ".")


def _is_ruled(word: Override) -> bool:
    """Whether a word is about keys of a rule, or about what lies above them."""
    roots = {name.partition(".")[0] for rule in COMMAND_LINE for name in rule.keys}
    return _dotted(word).partition(".")[0] in roots


def _of_chosen(word: Override) -> bool:
    return _below(_dotted(word), CHOSEN)


def _forced(word: Override) -> str:
    """The word; one about a tracker also adds, since the file that has the tracker may be one of those left out."""
    line = str(word.input_line)
    return f"++{line.lstrip('+')}" if line.lstrip("+").startswith("logger.") else line


def table() -> str:
    """Both tables of docs/security.md, in Markdown."""
    lines = ["| on the command line only | because it |", "|---|---|"]
    lines += [f"| {_names(rule)} | {rule.why} |" for rule in COMMAND_LINE]
    lines += ["", "| of Hydra's own in a file too | what it is |", "|---|---|"]
    lines += [f"| {_names(rule)} | {rule.why} |" for rule in FILES]
    return "\n".join(lines)


def _names(rule: Rule) -> str:
    return ", ".join(f"`{name}`" for name in rule.keys)


if __name__ == "__main__":
    print(table())
