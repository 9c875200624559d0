"""Values as the words of a command line: `key=value` in Hydra's grammar."""

import re
from typing import Any

PLAIN = re.compile(r"[\w./:@%+-]*[A-Za-z./][\w./:@%+-]*", re.ASCII)
NOT_TEXT = re.compile(r"(?i)null|true|false|nan|inf|[\d.+-]+(e[+-]?\d+)?")


def word(key: str, value: Any) -> str:
    """`key=value` that Hydra reads as this value; for a shell it may still have to be quoted."""
    return f"{key}={literal(value)}"


def literal(value: Any) -> str:
    """A value in Hydra's grammar."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{','.join(literal(item) for item in value)}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{literal(item)}' for key, item in value.items())}}}"
    if isinstance(value, str) and (not PLAIN.fullmatch(value) or NOT_TEXT.fullmatch(value)):
        # Backslashes are themselves, but for those before a quote.
        return "'" + re.sub(r"(\\*)('|$)", lambda run: run[1] * 2 + ("\\'" if run[2] else ""), value) + "'"
    return str(value)
