"""Values of Arrow's rows as JSON would have them, so that a row says the same in every kind of file."""

import datetime
import decimal
import math
from typing import Any

DEPTH = 2  # of a struct within a list or struct: its nulls stand for keys that the row doesn't have


def plain_row(row: dict[str, Any]) -> dict[str, Any]:
    """A row without what the file format put in.

    Structs of a column have the same keys in every row, so that those which a row doesn't have are null: they are left
    out, but for those of a column's own structs, the messages, whose null text says something. Times become ISO text,
    and NaN, which pandas writes for what is missing, is null.
    """
    return {name: _plain(value, 0) for name, value in row.items()}


def _plain(value: Any, depth: int) -> Any:
    if isinstance(value, float) and math.isnan(value):
        return None
    if value is None or isinstance(value, str | int | float | bytes):
        return value
    if isinstance(value, list):
        return [_plain(item, depth) for item in value]
    if isinstance(value, dict):
        kept = {}
        for key, item in value.items():
            plain = _plain(item, depth + 1)
            if plain is not None or depth + 1 < DEPTH:
                kept[key] = plain
        return kept
    if isinstance(value, datetime.datetime | datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, decimal.Decimal | datetime.timedelta):
        return str(value)
    return value
