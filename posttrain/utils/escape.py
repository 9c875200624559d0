"""Text from outside, as it may be written to a terminal or a page: control characters are spelt out, so none acts.

Half characters (surrogates: `\\ud800` in JSON, names of files that are not UTF-8) are as well; no encoding has them.
"""

import re

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def escape_control(text: str) -> str:
    """`text` with its control characters, but tabs and line ends, as Python writes them: `\\x1b`."""
    return CONTROL.sub(lambda char: repr(char.group())[1:-1], text)


def shorten(text: str, length: int) -> str:
    """The first `length` characters of `text`, and that there are more."""
    return text if len(text) <= length else f"{text[:length]}..."


def shorten_front(text: str, length: int) -> str:
    """`text` in at most `length` characters, its end where it is longer: of paths the beginning is often shared."""
    return text if len(text) <= length else f"...{text[3 - length :]}"


def encodable(text: str) -> str:
    """Return `text` with a question mark for each half character.

    Python makes half characters of typed bytes that are not UTF-8, and JSON can spell them.
    """
    return text.encode("utf-8", "replace").decode("utf-8")
