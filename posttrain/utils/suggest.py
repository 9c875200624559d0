"""The nearest known name to one that was mistyped."""

import difflib
from collections.abc import Iterable


def nearest(name: str, candidates: Iterable[str]) -> str | None:
    """Return the candidate most like `name`, or None when none is like it.

    A dotted path is compared as a whole and by its last part, since people forget the group as
    often as they mistype.
    """
    known = list(candidates)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if close:
        return close[0]
    paths_by_tail: dict[str, str] = {}
    for path in known:
        paths_by_tail.setdefault(path.rpartition(".")[2], path)
    close = difflib.get_close_matches(name.rpartition(".")[2], paths_by_tail, n=1, cutoff=0.6)
    if not close:
        return None
    return paths_by_tail[close[0]]


def did_you_mean(name: str, candidates: Iterable[str]) -> str:
    """Return "; did you mean `...`?" to end an error message with, or "" when nothing is near."""
    match = nearest(name, candidates)
    return f"; did you mean `{match}`?" if match else ""
