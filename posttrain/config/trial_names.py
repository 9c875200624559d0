"""Stable names: the same command finds the trials that it made before."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override

# Keys that say where and how a run is run, not what it computes.
PLACES = ("run", "cache_dir", "launch", "hydra", "logger", "sweep")
LONGEST = 120  # characters of a name; a file name has 255, of which exports and logs need some


def is_place(key: str) -> bool:
    """Whether `key` says where or how a run is run."""
    return any(key == place or key.startswith(f"{place}.") for place in PLACES)


def sweep_name(given: str | None, overrides: Sequence[str], params: Mapping[str, Any] | None) -> str:
    """Resolver of `hydra.sweep.dir`: `given`, else the swept keys and a hash of all that is fixed.

    Values may thus be added to a grid later; another model or data set is another sweep.
    """
    if given is not None:
        return _clean(given)
    swept = swept_keys(overrides, params)
    fixed = {_key(o): o.value() for o in _parse(overrides) if _key(o) not in swept}
    identity = {key: value for key, value in fixed.items() if not is_place(key)}
    words = "-".join(short(key, swept) for key in swept) or "sweep"
    return f"{_clean(words)[:LONGEST]}-{_hash([sorted(swept), identity])}"


def swept_keys(overrides: Sequence[str], params: Mapping[str, Any] | None) -> list[str]:
    """The keys that vary: those of the search space in YAML, then those of the command line."""
    typed = [_key(o) for o in _parse(overrides) if o.is_sweep_override()]
    return list(dict.fromkeys([*(str(key) for key in params or ()), *typed]))


def trial_name(overrides: Iterable[str], swept: Sequence[str]) -> str:
    """The folder of a trial: its values of the swept keys, `lr=0.0001,rank=8`.

    Args:
        overrides: the trial's own command line; 1e-4 and 0.0001 are the same.
        swept: see `swept_keys`.
    """
    values = {_key(o): o.value() for o in _parse(overrides)}
    own = {key: values[key] for key in swept if key in values and not is_place(key)}
    whole, said = (
        ",".join(f"{short(key, swept)}={say(value)}" for key, value in own.items()) or "trial"
        for say in (_exactly, _briefly)
    )
    name = _clean(said)
    return name if name == whole and len(name) <= LONGEST else f"{name[:LONGEST]}-{_hash(whole)}"


def difference(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Say what of two flat configurations differs, places aside: ["seed: 1 -> 2", ...]."""
    keys = dict.fromkeys([*old, *new])
    return [
        f"{key}: {json.dumps(old.get(key))} -> {json.dumps(new.get(key))}"
        for key in keys
        if not is_place(key) and old.get(key) != new.get(key)
    ]


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}; lists and empty dictionaries stay values."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def short(key: str, keys: Sequence[str]) -> str:
    """`optimizer.lr` -> `lr` where no other of `keys` ends so."""
    last = key.rpartition(".")[2]
    return last if sum(other.rpartition(".")[2] == last for other in keys) <= 1 else key


def _parse(overrides: Iterable[str]) -> list[Override]:
    return OverridesParser.create().parse_overrides(list(overrides))


def _key(override: Override) -> str:
    return override.get_key_element().lstrip("+~")


def _exactly(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str, separators=(",", ":"))


def _briefly(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else _exactly(value)


def _clean(text: str) -> str:
    """Only characters that are safe in a file name."""
    return re.sub(r"[^\w.,=+-]+", "_", text).lstrip(".") or "_"


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:8]
