"""Stable names: the same command finds the trials that it made before."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override

from posttrain.errors import UserError

# Keys that say where and how a run is run, not what it computes.
RUN_LOCAL = ("run", "cache_dir", "launch", "hydra", "logger", "sweep")
EXACT = 2**53  # below which every whole number is a float of its own
LONGEST = 120  # characters of a name; a file name has 255, of which exports and logs need some


def is_run_local(key: str) -> bool:
    """Whether `key` says where or how a run is run."""
    return key.partition(".")[0] in RUN_LOCAL


def sweep_name(given: str | None, overrides: Sequence[str], params: Mapping[str, Any] | None) -> str:
    """Resolver of `hydra.sweep.dir`: `given`, else the swept keys and a hash of all that is fixed.

    Values may thus be added to a grid later; another model or data set is another sweep.
    """
    if given is not None:
        return _clean(given)
    swept = swept_keys(overrides, params)
    identity = {}
    for override in _parse(overrides):
        key = _key(override)
        if key not in swept and not is_run_local(key):
            identity[key] = canonical(override.value())
    keys = "-".join(short(key, swept) for key in swept) or "sweep"
    return f"{_clean(keys)[:LONGEST]}-{_hash([swept, identity])}"


def swept_keys(overrides: Sequence[str], params: Mapping[str, Any] | None) -> list[str]:
    """The keys that vary, of the search space in YAML and of the command line, in alphabetical order."""
    return list(swept_ranges(overrides, params))


def swept_ranges(overrides: Sequence[str], params: Mapping[str, Any] | None) -> dict[str, str]:
    """The keys that vary, in alphabetical order -> of what, as it is written: `8,16`, `interval(1e-5,1e-3)`."""
    ranges = {}
    for key, value in (params or {}).items():
        ranges[str(key)] = str(value)
    for override in _parse(overrides):
        if override.is_sweep_override():
            ranges[_key(override)] = override.get_value_string()
    return dict(sorted(ranges.items()))


def check_swept(swept: Mapping[str, str]) -> None:
    """What varies is part of what a trial computes; two that differ in nothing else are one trial.

    Args:
        swept: see `swept_ranges`.

    Raises:
        UserError: a key that varies says where or how a run is run.
    """
    for key, values in swept.items():
        if is_run_local(key):
            raise UserError(
                f"`{key}={values}`: trials of a sweep differ in what they compute, and this says where or how a run is "
                "run; give it one value (several trackers are a list, logger=[wandb,csv])"
            )


def trial_name(overrides: Iterable[str], swept: Sequence[str]) -> str:
    """The folder of a trial: its values of the swept keys, `lr=0.0001,rank=8`.

    Args:
        overrides: the trial's own command line; 1e-4 and 0.0001 are the same, and so are 10 and 10.0, or ./a and a.
        swept: see `swept_keys`.
    """
    values = {_key(override): canonical(override.value()) for override in _parse(overrides)}
    exact, brief = [], []
    for key in swept:
        if key in values and not is_run_local(key):
            exact.append(f"{short(key, swept)}={_exactly(values[key])}")
            brief.append(f"{short(key, swept)}={_briefly(values[key])}")
    whole = ",".join(exact) or "trial"
    name = _clean(",".join(brief) or "trial")
    if name == whole and len(name) <= LONGEST:
        return name
    return f"{name[:LONGEST]}-{_hash(whole)}"


def swept_values(overrides: Iterable[str], swept: Sequence[str]) -> dict[str, Any]:
    """Key -> a trial's value of each swept key, from its own command line; see `trial_name`."""
    values = {}
    for override in _parse(overrides):
        if _key(override) in swept:
            values[_key(override)] = canonical(override.value())
    return values


def difference(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What differs between two flat configurations, run-local keys aside: ["seed: 1 -> 2", ...]."""
    lines = []
    for key in dict.fromkeys([*old, *new]):
        before, after = canonical(old.get(key)), canonical(new.get(key))
        if before != after and not is_run_local(key):
            lines.append(f"{key}: {json.dumps(before)} -> {json.dumps(after)}")
    return lines


def canonical(value: Any) -> Any:
    """One form of what means the same: 10.0 is 10, and ./rows.jsonl is rows.jsonl; lists and mappings item by item."""
    if isinstance(value, float) and value.is_integer() and abs(value) < EXACT:
        return int(value)
    if isinstance(value, str):
        return re.sub(r"^(\./+)+(?=.)", "", value)
    if isinstance(value, list):
        return list(map(canonical, value))
    if isinstance(value, dict):
        return {key: canonical(item) for key, item in value.items()}
    return value


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
    ends = [other.rpartition(".")[2] for other in keys]
    return last if ends.count(last) <= 1 else key


def _parse(overrides: Iterable[str]) -> list[Override]:
    return OverridesParser.create().parse_overrides(list(overrides))


def _key(override: Override) -> str:
    return override.get_key_element().lstrip("+~")


def _exactly(value: object) -> str:
    if isinstance(value, str):
        return value
    return json.dumps(value, default=str, separators=(",", ":"))


def _briefly(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else _exactly(value)


def _clean(text: str) -> str:
    """Only characters that are safe in a file name."""
    return re.sub(r"[^\w.,=+-]+", "_", text).lstrip(".") or "_"


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:8]
