"""Mappings."""

from collections.abc import Mapping


def without_none[K, V](values: Mapping[K, V | None]) -> dict[K, V]:
    """What has a value."""
    return {key: value for key, value in values.items() if value is not None}
