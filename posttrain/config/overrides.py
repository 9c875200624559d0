"""Format values as command-line overrides: `key=value` in Hydra's grammar."""

import re
from collections.abc import Sequence
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob
from hydra.errors import HydraException

from posttrain.errors import UserError

OPEN = ("hydra.launcher.sbatch.", "trainer.megatron.")  # groups that take any key; Hydra requires a plus to add one
PLAIN = re.compile(r"[\w./:@%+-]*[A-Za-z./][\w./:@%+-]*", re.ASCII)
EXPRESSIONS = ("data.where",)  # keys of texts in a grammar of their own
NOT_A_NAME = re.compile(r"(?i)true|false|[\d.+-]*\d[\d.+-]*(e[+-]?\d+)?")  # of a file
NOT_TEXT = re.compile(r"(?i)null|true|false|nan|inf|[\d.+-]+(e[+-]?\d+)?")


def quote_expressions(arguments: Sequence[str]) -> list[str]:
    """The arguments of a command line with expressions in quotes where Hydra's grammar can't read them as they are.

    So `data.where='lang == "en"'` is typed as any other text for a shell, which takes the outer quotes away.
    """
    quoted = []
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key in EXPRESSIONS:
            try:
                OverridesParser.create().parse_override(argument)
            except HydraException:
                argument = format_override(key, value)
        quoted.append(argument)
    return quoted


def list_globs(arguments: Sequence[str], folders: Sequence[Path]) -> list[str]:
    """The arguments of a command line with the names that Hydra's `glob(...)` stands for.

    So a sweep's trials are known wherever its command line is read.

    Args:
        arguments: of a command line.
        folders: of configurations, with a folder for each group.

    Raises:
        UserError: no choice of the group has such a name.
    """
    listed = []
    for argument in arguments:
        pattern = _glob(argument)
        if pattern is None:
            listed.append(argument)
            continue
        group = argument.partition("=")[0]
        names: set[str] = set()
        for folder in folders:
            names.update(path.stem for path in (folder / group.lstrip("+").partition("@")[0]).glob("*.yaml"))
        found = pattern.filter(sorted(names))
        if not found:
            choices = f"choices: {', '.join(sorted(names))}" if names else "there is no such group"
            raise UserError(f"{argument}: no file of a group is called so; {choices}")
        listed.append(f"{group}={','.join(map(format_value, found))}")
    return listed


def _glob(argument: str) -> Glob | None:
    """The pattern that is an override's value; None: it is something else."""
    if "glob(" not in argument:
        return None
    try:
        value = OverridesParser.create().parse_override(argument).value()
    except HydraException:  # said when it is composed
        return None
    return value if isinstance(value, Glob) else None


def quote_choices(arguments: Sequence[str], conf: Path) -> list[str]:
    """The overrides with numbers that are given for a group in quotes, as Hydra looks for files by texts alone.

    So `precision=16` is a choice that there is not, as `precision=fp16` is.

    Args:
        arguments: overrides.
        conf: folder with a folder for each group.
    """
    quoted = []
    for argument in arguments:
        key, _, value = argument.partition("=")
        if NOT_A_NAME.fullmatch(value) and (conf / key).is_dir():
            argument = f"{key}={_quote(value)}"
        quoted.append(argument)
    return quoted


def format_override(key: str, value: object) -> str:
    """Return `key=value` that Hydra reads as this value, a key of an open group with the plus that adds it.

    A shell may require quotes around it.
    """
    plus = "+" if key.startswith(OPEN) else ""
    return f"{plus}{key}={format_value(value)}"


def format_value(value: object) -> str:
    """Return a value in Hydra's grammar."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{','.join(map(format_value, value))}]"
    if isinstance(value, dict):
        items = [f"{key}:{format_value(item)}" for key, item in value.items()]
        return f"{{{','.join(items)}}}"
    if isinstance(value, str) and (not PLAIN.fullmatch(value) or NOT_TEXT.fullmatch(value)):
        return _quote(value)
    return str(value)


def _quote(text: str) -> str:
    """`text` in single quotes. Backslashes stand for themselves, but for those before a quote."""

    def escape(match: re.Match[str]) -> str:
        backslashes, quote = match.groups()
        if quote:
            return backslashes * 2 + "\\'"
        return backslashes * 2

    return "'" + re.sub(r"(\\*)('|$)", escape, text) + "'"
