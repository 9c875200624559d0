"""JSON as rows and their texts have it: no key is lost where an object has it twice, and NaN is no value.

Python's own decoder keeps the last of several values of a key, and reads `NaN` and `Infinity`, which JSON doesn't have;
pandas and Python write the former for what is missing.
"""

import json
from typing import Any, NoReturn


class RepeatedKey(dict[str, Any]):
    """An object of which a key is there twice; it is refused where its row is known.

    Attributes:
        key: that key.
    """

    key: str


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    names = [name for name, _ in pairs]
    repeated = RepeatedKey(found)
    repeated.key = next(name for name in names if names.count(name) > 1)
    return repeated


def _refuse_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = _pairs(pairs)
    if isinstance(found, RepeatedKey):
        raise ValueError(f"the key {found.key!r} is there twice")
    return found


def _missing(constant: str) -> None:
    if constant != "NaN":
        _refuse_constant(constant)


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a value of JSON")


# Of a row: NaN is null, and an object with a key twice is a RepeatedKey, so that reading can continue behind it.
ROWS = json.JSONDecoder(object_pairs_hook=_pairs, parse_constant=_missing)
# Of a text within a row, for which both are errors (ValueError).
TEXTS = json.JSONDecoder(object_pairs_hook=_refuse_repetition, parse_constant=_refuse_constant)
