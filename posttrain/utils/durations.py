"""Times as people say them."""

import math

UNITS = (("d", 86_400), ("h", 3_600), ("min", 60), ("s", 1))


def format_duration(seconds: float) -> str:
    """The two largest units of a time: `35 s`, `4 min 10 s`, `2 h 14 min`, `3 d 4 h`; `?` if it is not a number."""
    if not math.isfinite(seconds):
        return "?"
    left = max(0, round(seconds))
    smallest = 1 if left < 3_600 else 60  # beside hours nobody counts seconds, beside days no minutes
    if left >= 86_400:
        smallest = 3_600
    left = round(left / smallest) * smallest
    parts = []
    for unit, size in UNITS:
        count, left = divmod(left, size)
        if count:
            parts.append(f"{count} {unit}")
    return " ".join(parts) or "0 s"
