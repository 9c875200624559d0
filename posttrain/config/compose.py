"""From the command line to a composed, checked configuration, with errors that a person can act on.

Imports neither torch nor Megatron: `--help`, `--cfg job` and a mistyped key must answer at once.
"""

import contextlib
import difflib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from posttrain.config import hydra_guard, policy, schema, secrets
from posttrain.config.trial_names import sweep_name
from posttrain.errors import UserError

PACKAGE = Path(__file__).resolve().parents[1]
CONF_DIR = policy.SHIPPED

OPEN = ("hydra.launcher.sbatch.", "trainer.megatron.")  # groups that take any key

schema.register()
secrets.register()
OmegaConf.register_new_resolver("times", lambda a, b: float(a) * float(b), replace=True)
# Cached by OmegaConf, and Hydra copies the cache to each trial's configuration: the whole sweep has one name.
OmegaConf.register_new_resolver("sweep_name", sweep_name, use_cache=True, replace=True)


def compose(overrides: list[str] | None = None, config_name: str = "config", with_hydra: bool = False) -> DictConfig:
    """Compose in-process, without Hydra's run directory and without recipes; for library use and tests.

    Args:
        overrides: words of a command line.
        config_name: the file of conf/ to begin with.
        with_hydra: whether to keep Hydra's own settings under `hydra`.

    Raises:
        UserError: for what `run` would report with exit code 2.
    """
    hydra_guard.install()
    overrides = list(overrides or [])
    outer = GlobalHydra.instance().hydra  # set when this is called from a command, e.g. at the end of a sweep
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(config_dir=str(CONF_DIR), version_base="1.3"):
            return hydra.compose(config_name=config_name, overrides=overrides, return_hydra_config=with_hydra)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(explain(error, overrides, config_name)) from error
    finally:
        GlobalHydra.instance().hydra = outer


def explain(error: BaseException, overrides: list[str], config_name: str = "config") -> str:
    """One readable message for an error of Hydra's or OmegaConf's, with the likely intended name."""
    text = " ".join(str(error).split())
    cause = " ".join(str(error.__cause__).split()) if error.__cause__ else ""
    whole = f"{text} {cause}"

    if isinstance(error, OverrideParseException):
        key, _, value = str(error.override).partition("=")
        if value.startswith("~"):
            return f"{error.override}: the shell leaves ~ as it is here; write {key}=$HOME{value[1:]}"
        quoted = f'{key}="{value}"' if value and not {'"', "\\"} & set(value) else 'key="a,b"'
        return f"{error.override}: can't be read as KEY=VALUE. Text is quoted, for the shell as well: '{quoted}'"

    full_key = re.search(r"full_key: (\S+)", whole)
    unknown = re.search(r"[Kk]ey '([^']+)' is not in struct|Could not (?:override|append to) '([^']+)'", whole)
    if unknown or "is not in struct" in whole or "not in '" in whole:
        key = _overridden(text) or (full_key and full_key[1]) or (unknown and (unknown[2] or unknown[1])) or ""
        if key.startswith(OPEN):
            return f"`{key}`: a key that is added is written with a plus sign: +{key}=..."
        file = re.match(r"In '([^']+)': ", text)
        place = f" in {file[1]}.yaml" if file else ""
        meant = _meant(key, _known_keys(config_name)) or "."
        return f"`{key}`: unknown key{place}{meant} All keys: python -m posttrain --cfg job"

    if isinstance(error, MissingConfigException):
        name = getattr(error, "missing_cfg_file", None) or text
        group, _, choice = str(name).rpartition("/")
        options = list(getattr(error, "options", None) or _choices(group))
        meant = _meant(choice, options)
        return f"`{group}={choice}`: there is no such choice" + (meant or f". Choices: {', '.join(options)}")

    group = re.search(r"Could not override '([^']+)'\. No match in the defaults list", whole)
    if group:
        return f"`{group[1]}`: unknown word{_meant(group[1], _choices(''))}"

    key = _overridden(text)
    if cause and key:
        value = next((o.partition("=")[2] for o in overrides if o.lstrip("+~").partition("=")[0] == key), None)
        reason = cause.split(" full_key:")[0].split(" reference_type")[0]
        return f"`{key}={value}`: {reason}" if value is not None else f"`{key}`: {reason}"
    return (f"`{full_key[1]}`: " if full_key else "") + text.split(" full_key:")[0]


def _overridden(text: str) -> str | None:
    """The key that Hydra's merge error is about, if it says so."""
    found = re.search(r"(?:Error merging override|Could not override|Could not append to config) '?\+?([\w.@/]+)", text)
    return found[1] if found else None


def _meant(word: str, candidates: list[str]) -> str:
    """ "; did you mean ...?" for the nearest candidates, else nothing.

    A path is compared as a whole and by its last part, since people forget the group as often as they mistype.
    """
    tail = word.rpartition(".")[2]
    close = difflib.get_close_matches(word, candidates, n=1, cutoff=0.6)
    if not close:
        tails = {c.rpartition(".")[2]: c for c in reversed(candidates)}
        close = [tails[t] for t in difflib.get_close_matches(tail, tails, n=1, cutoff=0.6)]
    return f"; did you mean `{close[0]}`?" if close else ""


def _known_keys(config_name: str) -> list[str]:
    """Every key path of the configuration that the command line's group choices compose, else of the default one."""
    words = []
    for arg in sys.argv[1:]:
        key, is_override, _ = arg.partition("=")
        if is_override and (CONF_DIR / key).is_dir():
            words.append(arg)
    for attempt in (words, []):
        with contextlib.suppress(Exception):  # a bad group choice as well: the default configuration still helps
            return list(flatten(compose(attempt, config_name)))
    return []


def _choices(group: str) -> list[str]:
    """What can be chosen in a group, or the groups themselves for ''."""
    folder = CONF_DIR / group
    if not folder.is_dir():
        return []
    return sorted(p.name if p.is_dir() else p.stem for p in folder.iterdir() if not group or p.suffix == ".yaml")


def flatten(node: Any, prefix: str = "") -> Iterator[str]:
    """Every key path below `node`, inner nodes included."""
    if isinstance(node, DictConfig) and not node._is_none():
        for key in node:
            path = f"{prefix}.{key}" if prefix else str(key)
            yield path
            yield from flatten(node._get_node(key), path)


def overrides_of(argv: list[str]) -> dict[str, str]:
    """KEY -> VALUE text of the overrides in `argv`, in Hydra's own grammar."""
    parsed = OverridesParser.create().parse_overrides([a for a in argv if not a.startswith("-")])
    return {o.key_or_group: o.input_line.partition("=")[2] for o in parsed}
