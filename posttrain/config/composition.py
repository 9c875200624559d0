"""From the command line to a composed, checked configuration, with errors that a person can act on.

Imports neither torch nor Megatron: `--help`, `--cfg job` and a mistyped key must answer at once.
"""

import contextlib
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from posttrain.config import hydra_guard, policy, schema, secrets, synonyms, yaml_file
from posttrain.config.overrides import OPEN
from posttrain.config.trial_names import sweep_name
from posttrain.errors import UserError
from posttrain.utils.suggest import did_you_mean

PACKAGE = Path(__file__).resolve().parents[1]
CONF_DIR = policy.SHIPPED

NO_CHOICES = ("basic", "slurm_schema")  # of hydra/launcher: Hydra's own, which this project replaces, and a type

# In messages of Hydra's and OmegaConf's.
# Hydra names the file by its group, which its keys and choices are put below.
NO_PACKAGE = re.compile(r"In '((\w+)/[^']+)': .*(?:[Kk]ey '\2' (?:is )?not in |Could not override '[\w/]+@\2[.'])")
FULL_KEY = re.compile(r"full_key: (\S+)")
SEVERAL_VALUES = re.compile(r"Ambiguous value for argument '([^=]+)=(.*)' 1\.")
UNKNOWN_KEY = re.compile(r"[Kk]ey '([^']+)' is not in struct|Could not (?:override|append to) '([^']+)'")

schema.register()
secrets.register()
OmegaConf.register_new_resolver("times", lambda left, right: float(left) * float(right), replace=True)
# A value that a file gives, for as long as nobody gives the other one of two that exclude each other.
OmegaConf.register_new_resolver("if_null", lambda other, value: value if other is None else None, replace=True)
# Cached by OmegaConf, and Hydra copies the cache to each trial's configuration: the whole sweep has one name.
OmegaConf.register_new_resolver("sweep_name", sweep_name, use_cache=True, replace=True)


def compose(overrides: list[str] | None = None, config_name: str = "config", with_hydra: bool = False) -> DictConfig:
    """Compose in-process, without Hydra's run directory and without recipes; for library use and tests.

    Args:
        overrides: of a command line.
        config_name: the file of conf/ to begin with.
        with_hydra: whether to keep Hydra's own settings under `hydra`.

    Raises:
        UserError: for what `run` would report with exit code 2.
    """
    overrides = list(overrides or [])
    try:
        return _compose(overrides, config_name, with_hydra)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(explain(error, overrides, config_name)) from error


def _compose(overrides: list[str], config_name: str, with_hydra: bool = False) -> DictConfig:
    """Compose; an error is Hydra's or OmegaConf's own."""
    hydra_guard.install()
    outer = GlobalHydra.instance().hydra  # set when this is called from a command, e.g. at the end of a sweep
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(config_dir=str(CONF_DIR), version_base="1.3"):
            return hydra.compose(config_name=config_name, overrides=overrides, return_hydra_config=with_hydra)
    finally:
        GlobalHydra.instance().hydra = outer


def explain(error: BaseException, overrides: list[str], config_name: str = "config") -> str:
    """One readable message for an error of Hydra's or OmegaConf's, with the likely intended name."""
    if isinstance(error, OverrideParseException):
        return _explain_syntax(error)
    if isinstance(error, hydra_guard.UndeclaredKey):
        return _explain_key(error.key, "", config_name)
    text = " ".join(str(error).split())
    several = SEVERAL_VALUES.search(text)
    if several:
        as_list = shlex.quote(f"{several[1]}=[{several[2]}]")
        return f"`{several[1]}`: several values: --multirun tries one after the other; a list of them is {as_list}"
    if "does not support sweep type" in text:
        return (
            "a range, as interval(1e-5,1e-3), is a search's: add hydra/sweeper=optuna; a grid takes values: "
            "optimizer.lr=1e-4,2e-4"
        )
    cause = " ".join(str(error.__cause__ or "").split())
    whole = f"{text} {cause}"
    if UNKNOWN_KEY.search(whole) or "is not in struct" in whole or "not in '" in whole:
        return _explain_unknown_key(text, whole, config_name)
    if isinstance(error, MissingConfigException):
        return _explain_missing_choice(error, text)
    group = re.search(r"Could not override '([^']+)'\. No match in the defaults list", whole)
    if group:
        return _explain_key(group[1], "", config_name)
    key = _overridden_key(text)
    if cause and key:
        return _explain_value(key, cause, overrides)
    message = text.split(" full_key:")[0]
    full_key = FULL_KEY.search(whole)
    return f"`{full_key[1]}`: {message}" if full_key else message


def _explain_syntax(error: OverrideParseException) -> str:
    """An override that Hydra's grammar can't read."""
    key, _, value = str(error.override).partition("=")
    if value == "~" or value.startswith("~/"):
        return f"{error.override}: the shell leaves ~ as it is here; write {key}=$HOME{value[1:]}"
    if value.startswith("~"):
        return f"{error.override}: the shell leaves ~ as it is here; write the whole path"
    example = 'key="a,b"'
    if value and not {'"', "\\"} & set(value):
        example = f'{key}="{value}"'
    return (
        f"{error.override}: can't be read as KEY=VALUE. Text is quoted, for the shell as well: {shlex.quote(example)}"
    )


def _explain_unknown_key(text: str, whole: str, config_name: str) -> str:
    """A key that no schema has, with the nearest one that there is."""
    unpacked = NO_PACKAGE.search(text)
    if unpacked:
        return (
            f"`{unpacked[2]}`: unknown key: that is where {unpacked[1]}.yaml puts its keys; a file that sets keys of "
            "other groups begins with the line # @package _global_"
        )
    key = _overridden_key(text)
    full_key = FULL_KEY.search(whole)
    unknown = UNKNOWN_KEY.search(whole)
    if not key and full_key:
        key = full_key[1]
    if not key and unknown:
        key = unknown[2] or unknown[1]
    key = key or ""
    if key.startswith(OPEN):
        return f"`{key}`: a key that is added is written with a plus sign: +{key}=..."
    file = re.match(r"In '([^']+)': ", text)
    return _explain_key(key, f" in {file[1]}.yaml" if file else "", config_name)


def _explain_key(key: str, location: str, config_name: str) -> str:
    """An unknown key: what another framework's name is here, else what it may be a misspelling of."""
    advice = synonyms.advice_on_key(key)
    known = [*_known_keys(config_name), *_launcher_keys()]
    if advice:
        advice += "."
    elif key in known and not key.startswith("hydra."):  # of a file, since the command line takes it
        group, _, name = key.rpartition(".")
        advice = f"; in a file of Hydra's it is `{name}`, indented below `{group}:`."
    else:
        advice = _other_choices(key) or did_you_mean(key, known) or _elsewhere(key, known) or "."
    return f"`{key}`: unknown key{location}{advice} {_where_keys_are(key)}"


def _elsewhere(key: str, known: Sequence[str]) -> str:
    """The one key of another group with the same name; empty where there is none, or several."""
    name = key.rpartition(".")[2]
    found = [other for other in known if other.rpartition(".")[2] == name]
    return f"; did you mean `{found[0]}`?" if len(found) == 1 else ""


def _where_keys_are(key: str) -> str:
    """The command that lists what a key may have been meant to be."""
    group, _ = _of_group(key)
    if group != "hydra" and (CONF_DIR / group).is_dir():
        return f"All keys of {group}: python -m posttrain options {group}"
    return "All keys: python -m posttrain --cfg job"


def _of_group(key: str) -> tuple[str, str]:
    """The config group that a key may be of, and the rest of the key."""
    if key.startswith("hydra.launcher."):
        return "hydra/launcher", key.removeprefix("hydra.launcher.")
    group, _, rest = key.partition(".")
    return group, rest


def _launcher_keys() -> list[str]:
    """The keys of Hydra's launchers that this project has."""
    names = set()
    for path in (CONF_DIR / "hydra" / "launcher").glob("*.yaml"):
        names |= set(key_paths(yaml_file.read(path)))
    return [f"hydra.launcher.{name}" for name in sorted(names)]


def _other_choices(key: str) -> str:
    """The choices of a key's group that have it, and how one is made; empty where none has."""
    group, rest = _of_group(key)
    owners = []
    for name in _choices(group):
        if rest in key_paths(yaml_file.read(CONF_DIR / group / f"{name}.yaml")):
            owners.append(f"{group}={name}")
    if not owners:
        return ""
    *_, name = owners[0].partition("=")
    return (
        f"; it belongs to {' and '.join(owners)}, to be chosen first: {owners[0]} {key}=...; in a file "
        f"`{group}: {name}` and `{key}: ...`, a line each."
    )


def _explain_missing_choice(error: MissingConfigException, text: str) -> str:
    """A choice of a group for which there is no file."""
    group, _, choice = str(error.missing_cfg_file or text).rpartition("/")
    options = [option for option in error.options or _choices(group) if option not in NO_CHOICES]
    file = re.match(r"In '([^']+)': ", text)
    meant = group.rpartition("/")[2]
    if file and not options and _choices(meant):
        return (
            f"`{group}={choice}`: there is no such choice: that is what `{meant}: {choice}` means in the defaults of "
            f"{file[1]}.yaml; to choose in the group of the whole run: `override /{meant}: {choice}`"
        )
    suggestion = synonyms.advice_on_choice(group, choice) or did_you_mean(choice, options)
    if not suggestion:
        suggestion = f". Choices: {', '.join(options)}"
        beginning = [option for option in options if option.startswith(choice)]
        if beginning:
            suggestion = f". Choices that begin so: {', '.join(beginning)}"
    return f"`{group}={choice}`: there is no such choice{suggestion}"


def _explain_value(key: str, cause: str, overrides: list[str]) -> str:
    """A value that the schema refuses, as it was given on the command line if it was."""
    reason = cause.split(" full_key:")[0].split(" reference_type")[0]
    for override in overrides:
        name, _, value = override.lstrip("+~").partition("=")
        if name == key:
            return f"`{key}={value}`: {reason}"
    return f"`{key}`: {reason}"


def _overridden_key(text: str) -> str | None:
    """The key that Hydra's merge error is about, if it says so."""
    match = re.search(r"(?:Error merging override|Could not override|Could not append to config) '?\+?([\w.@/]+)", text)
    return match[1] if match else None


def _known_keys(config_name: str) -> list[str]:
    """Every key path of the configuration that the command line's group choices compose, else of the default one."""
    choices = []
    for argument in sys.argv[1:]:
        key, is_override, _ = argument.partition("=")
        if is_override and (CONF_DIR / key).is_dir():
            choices.append(argument)
    for attempt in (choices, []):
        with contextlib.suppress(Exception):  # a bad group choice as well: the default configuration still helps
            return list(key_paths(_compose(attempt, config_name)))
    return []


def _choices(group: str) -> list[str]:
    """What can be chosen in a group, or the groups themselves for ''."""
    folder = CONF_DIR / group
    if not folder.is_dir():
        return []
    names = []
    for path in folder.iterdir():
        if path.suffix == ".yaml":
            names.append(path.stem)
        elif not group:
            names.append(path.name)
    return sorted(names)


def key_paths(node: object, prefix: str = "") -> Iterator[str]:
    """Every key path below `node`, inner nodes included."""
    if not isinstance(node, DictConfig) or node._is_none():
        return
    for key in node:
        name = str(key)
        path = f"{prefix}.{name}" if prefix else name
        yield path
        yield from key_paths(node._get_node(key), path)
