"""Every change to upstream behaviour, each with its name, symptom, version range and condition.

A patch is a function decorated with `patch`. `apply(platform)` runs those whose condition holds, in order of
registration, once per process, and returns their names; the worker logs them and tests assert that the set is minimal.
"""

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass

from packaging.specifiers import SpecifierSet


@dataclass(frozen=True)
class Platform:
    """What the patches' conditions look at.

    Attributes:
        device: "cpu" or "cuda".
        transformer_engine: whether Transformer Engine can be imported.
    """

    device: str
    transformer_engine: bool

    @classmethod
    def detect(cls, device: str) -> "Platform":
        """The platform of this process; Transformer Engine counts only on a GPU. Imports nothing."""
        import importlib.util

        found = device == "cuda" and importlib.util.find_spec("transformer_engine") is not None
        return cls(device, found)


@dataclass(frozen=True)
class Patch:
    """One change to upstream.

    Attributes:
        name: short and stable; what the log shows.
        symptom: what happens without it.
        versions: distribution name -> specifier of the versions it is known to be needed for.
        when: whether this platform needs it.
        apply: makes the change.
    """

    name: str
    symptom: str
    versions: dict[str, str]
    when: Callable[[Platform], bool]
    apply: Callable[[], None]

    def wanted(self, platform: Platform) -> bool:
        """Whether the condition holds and every installed version lies in the range."""
        return self.when(platform) and all(
            importlib.metadata.version(name) in SpecifierSet(spec, prereleases=True)
            for name, spec in self.versions.items()
        )


REGISTRY: dict[str, Patch] = {}
_applied: list[str] = []


def patch(name: str, symptom: str, versions: dict[str, str], when: Callable[[Platform], bool] = lambda p: True):
    """Register the decorated function as the patch `name`."""

    def register(apply: Callable[[], None]) -> Callable[[], None]:
        if name in REGISTRY:
            raise ValueError(f"two patches are called {name}")
        REGISTRY[name] = Patch(name, symptom, versions, when, apply)
        return apply

    return register


def apply(platform: Platform) -> list[str]:
    """Apply every wanted patch that this process has not applied yet; return the names of all applied so far."""
    from posttrain.patches import catalogue  # noqa: F401  (fills REGISTRY; imported here so that the order is one file's)

    for item in REGISTRY.values():
        if item.name not in _applied and item.wanted(platform):
            item.apply()
            _applied.append(item.name)
    return list(_applied)
