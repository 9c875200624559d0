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
from hydra.core.override_parser.types import Glob, Override
from omegaconf import DictConfig, ListConfig, OmegaConf

from posttrain.errors import UserError

PACKAGE = Path(__file__).resolve().parents[1]
# The configuration that is shipped: in a wheel inside the package, in a checkout beside it.
SHIPPED = next(folder for folder in (PACKAGE / "conf", PACKAGE.parent / "conf") if folder.is_dir())

CONTROL = re.compile(r"[\x00-\x1f\x7f]")  # what ends a line, or a word of a script


@dataclass(frozen=True)
class Rule:
    """Keys, and what is done with them.

    Attributes:
        keys: key paths; `*` stands for any text, and a key stands for all below it as well.
        why: what they decide; completes "KEY: ...".
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
        ("logger.*.entity", "logger.*.tracking_uri", "logger.*.space_id", "logger.*._args_"),
        "says to whom a run is sent (or the environment: WANDB_ENTITY, MLFLOW_TRACKING_URI, TRACKIO_SPACE_ID; or a "
        "file chosen with logger=)",
    ),
    Rule(("preview.out", "preview.html", "evaluate.out"), "is written to, outside of the run directory"),
    Rule(("convert",), "says what is written where, and what is published"),
    Rule(("hydra",), "is Hydra's own: commands, log handlers, directories, the mode, callbacks, the search path"),
)

FILES = (
    Rule(
        (
            "hydra.launcher.partition",
            "hydra.launcher.account",
            "hydra.launcher.qos",
            "hydra.launcher.constraint",
            "hydra.launcher.nodes",
            "hydra.launcher.gpus_per_node",
            "hydra.launcher.cpus_per_node",
            "hydra.launcher.mem_gb",
            "hydra.launcher.time",
            "hydra.launcher.signal_delay_s",
            "hydra.launcher.max_requeues",
            "hydra.launcher.array_parallelism",
            "hydra.launcher.poll_s",
        ),
        "what a Slurm job asks for",
    ),
    Rule(
        (
            "hydra.sweeper.params",
            "hydra.sweeper.n_trials",
            "hydra.sweeper.n_jobs",
            "hydra.sweeper.direction",
            "hydra.sweeper.max_failure_rate",
            "hydra.sweeper.max_batch_size",
            "hydra.sweeper.sampler",
        ),
        "a grid or search, over keys that a file may set; samplers are Optuna's",
    ),
)

# Groups whose file may be one's own: chosen on the command line, it is taken at its word about its own part.
CHOSEN = ("hydra.launcher", "hydra.sweeper", "logger")

MOST_TRIALS = 10_000  # of a search space in a file; Hydra lists all of them before the first begins

SEARCH_PATH = "hydra.searchpath"

# What Hydra fills in itself.
FILLED_IN = (
    "hydra.overrides",
    "hydra.runtime.version",
    "hydra.runtime.version_base",
    "hydra.runtime.cwd",
    "hydra.runtime.config_sources",
    "hydra.runtime.choices",
    "hydra.job.override_dirname",
    "hydra.job.config_name",
)


def rule_of(key: str) -> Rule | None:
    """The rule that keeps `key` out of files; None: a file may set it."""
    for rule in FILES:
        if _below(key, rule.keys):
            return None
    for rule in COMMAND_LINE:
        if _below(key, rule.keys):
            return rule
    return None


def rule_of_override(override: Override) -> Rule | None:
    """The rule that keeps an override out of files; None: a file may hold it.

    Args:
        override: a value that is a mapping sets what is in it, and a group may be put below another key (`group@key`).
    """
    key = _dotted(override)
    keys = [key, str(override.package or key)]
    value = override.value()
    if isinstance(value, dict):
        inner = {str(name): item for name, item in value.items()}
        for name, _ in _leaves(inner, key):
            keys.append(name)
    return next((rule for rule in map(rule_of, keys) if rule is not None), None)


def check(
    cfg: DictConfig,
    overrides: list[str],
    files: list[Path],
    compose: Callable[[list[str]], tuple[DictConfig, list[Path]]],
) -> None:
    """Refuse a configuration in which a file has set what is the command line's alone.

    Args:
        cfg: composed, with `hydra`, its interpolations as they are written.
        overrides: of the command line.
        files: that took part and are not shipped.
        compose: overrides -> the configuration of those and of the shipped files, and other files that took part.

    Raises:
        UserError: naming the key and the files.
    """
    names = ", ".join(map(str, files))
    listed = list(map(str, [*cfg.hydra.overrides["hydra"], *cfg.hydra.overrides["task"]]))
    if sorted(listed) != sorted(overrides):
        raise UserError(f"hydra.overrides: are those of the command line, a file can't add any ({names})")
    general, of_chosen = [], []  # overrides of ruled keys; those about groups whose file may be one's own
    for override in OverridesParser.create().parse_overrides(overrides):
        if not _is_ruled(override):
            continue
        if _below(_dotted(override), CHOSEN):
            of_chosen.append(_forced(override))
        else:
            general.append(_forced(override))
            if _dotted(override) == SEARCH_PATH:
                of_chosen.append(_forced(override))
    expected_cfg, others = compose(general)
    if others:
        raise UserError(f"{others[0]}: sets what is taken from the command line alone")
    values, expected = flat(cfg), flat(expected_cfg)
    chosen = expected
    if of_chosen != general:
        chosen_cfg, _ = compose(of_chosen)
        chosen = flat(chosen_cfg)
    for key in sorted(values.keys() | expected.keys() | chosen.keys()):
        rule = rule_of(key)
        if rule is None or _below(key, FILLED_IN):
            continue
        allowed = chosen if _below(key, CHOSEN) else expected
        if values.get(key) != allowed.get(key):
            raise UserError(f"{key}: {rule.why}; it is taken from the command line, and from no file ({names})")
    _check_space(values, chosen, names)


def _check_space(values: dict[str, Any], allowed: dict[str, Any], files: str) -> None:
    """Refuse a search space of a file with overrides about what is the command line's: each trial would have them."""
    space, points = "hydra.sweeper.params", 1
    for key, value in values.items():
        if not _below(key, (space,)) or value is None or allowed.get(key) == value:
            continue
        name = key.removeprefix(f"{space}.")
        swept = OverridesParser.create().parse_override(f"{name}={value}")
        if isinstance(swept.value(), Glob):
            raise UserError(f"{space}: {name}={value}: a file names the choices themselves, as a,b,c ({files})")
        if swept.is_discrete_sweep():
            points *= len(list(itertools.islice(swept.sweep_iterator(), MOST_TRIALS + 1)))
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


def _leaves(node: object, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict) and node:
        for key, value in node.items():
            yield from _leaves(value, _joined(path, key))
    else:
        yield path, node


def _joined(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)


def texts(node: object, path: str = "") -> Iterator[tuple[str, str]]:
    """(key path, text) of every text at or below `node`, as it is written; names of keys are texts as well."""
    if isinstance(node, DictConfig | ListConfig):
        node = OmegaConf.to_container(node, resolve=False)
    if isinstance(node, str):
        yield path, node
    elif isinstance(node, dict):
        for key, value in node.items():
            where = _joined(path, key)
            yield where, str(key)
            yield from texts(value, where)
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from texts(value, f"{path}[{index}]")


def _below(key: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(key, pattern) or fnmatchcase(key, f"{pattern}.*") for pattern in patterns)


def _dotted(override: Override) -> str:
    return override.key_or_group.replace("/", ".")


def _is_ruled(override: Override) -> bool:
    """Whether an override is about keys of a rule, or about what lies above them."""
    root = _dotted(override).partition(".")[0]
    for rule in COMMAND_LINE:
        for key in rule.keys:
            if key.partition(".")[0] == root:
                return True
    return False


def _forced(override: Override) -> str:
    """The override; one about a tracker also adds, since the file that has the tracker may be one of those left out."""
    line = str(override.input_line)
    plain = line.lstrip("+")
    return f"++{plain}" if plain.startswith("logger.") else line


def table() -> str:
    """Both tables of docs/security.md, in Markdown."""
    lines = ["| on the command line only | because it |", "|---|---|"]
    for rule in COMMAND_LINE:
        lines.append(_line(rule))
    lines += ["", "| of Hydra's own in a file too | what it is |", "|---|---|"]
    for rule in FILES:
        lines.append(_line(rule))
    return "\n".join(lines)


def _line(rule: Rule) -> str:
    keys = ", ".join(f"`{key}`" for key in rule.keys)
    return f"| {keys} | {rule.why} |"


if __name__ == "__main__":
    print(table())
