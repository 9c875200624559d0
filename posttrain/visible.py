"""Text from outside, as it may be written to a terminal: control characters are spelt out, so none of them acts."""

import re

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def visible(text: str) -> str:
    """`text` with its control characters, but tabs and line ends, as Python writes them: `\\x1b`."""
    return CONTROL.sub(lambda char: repr(char.group())[1:-1], text)
