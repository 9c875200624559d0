"""The known name that a mistyped one stands for, and none where that would be a guess."""

from collections.abc import Iterable


def nearest(name: str, candidates: Iterable[str]) -> str | None:
    """Return the candidate of which `name` is a misspelling, None where there is none or several are as near.

    A dotted path is compared part by part, then by its last part alone, since people forget the group as often as they
    mistype.
    """
    known = list(dict.fromkeys(candidates))
    best = _only_nearest(name.split("."), [path.split(".") for path in known])
    if best is None:
        tails = [path.rpartition(".")[2] for path in known]
        best = _only_nearest([name.rpartition(".")[2]], [[tail] for tail in tails])
    return None if best is None else known[best]


def did_you_mean(name: str, candidates: Iterable[str]) -> str:
    """Return "; did you mean `...`?" to end an error message with, or "" when nothing is near."""
    match = nearest(name, candidates)
    return f"; did you mean `{match}`?" if match else ""


def _only_nearest(name: list[str], candidates: list[list[str]]) -> int | None:
    """The position of the candidate with the fewest mistakes, if it is the only one with so few."""
    found: dict[int, list[int]] = {}  # mistakes -> positions
    for position, parts in enumerate(candidates):
        if len(parts) != len(name):
            continue
        mistakes = [_mistakes(mistyped, part) for mistyped, part in zip(name, parts, strict=True)]
        if None not in mistakes:
            found.setdefault(sum(filter(None, mistakes)), []).append(position)
    if not found:
        return None
    nearest_ones = found[min(found)]
    return nearest_ones[0] if len(nearest_ones) == 1 else None


def _mistakes(mistyped: str, word: str) -> int | None:
    """How many slips make `mistyped` of `word`; None: too many for a misspelling."""
    length = max(len(mistyped), len(word))
    most = 2
    if length < 8:
        most = 1
    if length < 3:
        most = 0
    if abs(len(mistyped) - len(word)) > most:
        return None
    distance = edit_distance(mistyped, word)
    return distance if distance <= most else None


def edit_distance(left: str, right: str) -> int:
    """Insertions, deletions, substitutions and swaps of neighbours that turn one text into the other.

    The optimal string alignment distance (https://en.wikipedia.org/wiki/Damerau-Levenshtein_distance).
    """
    before: list[int] = []
    above = list(range(len(right) + 1))
    for row, character in enumerate(left, 1):
        current = [row]
        for column, other in enumerate(right, 1):
            cost = min(above[column] + 1, current[-1] + 1, above[column - 1] + (character != other))
            swapped = row > 1 and column > 1 and left[row - 2 : row] == right[column - 2 : column][::-1]
            if swapped:
                cost = min(cost, before[column - 2] + 1)
            current.append(cost)
        before, above = above, current
    return above[-1]
