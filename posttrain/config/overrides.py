"""Format values as command-line overrides: `key=value` in Hydra's grammar."""

import re

OPEN = ("hydra.launcher.sbatch.", "trainer.megatron.")  # groups that take any key; Hydra requires a plus to add one
PLAIN = re.compile(r"[\w./:@%+-]*[A-Za-z./][\w./:@%+-]*", re.ASCII)
NOT_TEXT = re.compile(r"(?i)null|true|false|nan|inf|[\d.+-]+(e[+-]?\d+)?")


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
