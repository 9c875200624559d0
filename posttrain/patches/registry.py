"""What a change to upstream is, and what happens outside the versions it was tested with. No torch at import.

A patch is a function decorated with `patch`; runner.py applies them.
"""

import importlib.metadata
import importlib.util
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from functools import cache

from packaging.specifiers import SpecifierSet

from posttrain.errors import UserError

# Set to 1: make every change to whatever versions are installed. An environment variable, since no file can set one.
UNTESTED = "POSTTRAIN_UNTESTED_UPSTREAM"


class Kind(StrEnum):
    """What a change is for, which decides what happens outside the versions it was tested with."""

    STARTUP = "startup"
    """Saves time or memory, at start-up most of all; without it a run works, or fails before it trains. Skipped."""
    CPU = "cpu"
    """Lets a run work without a GPU. Skipped."""
    CORRECTNESS = "correctness"
    """Without it a run is wrong or lost. The run stops before it starts."""


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
    def with_gpus(cls, visible: int) -> "Platform":
        """That of a run which sees so many GPUs."""
        return cls.detect("cuda" if visible else "cpu")

    @classmethod
    def detect(cls, device: str) -> "Platform":
        """The platform of this process; Transformer Engine counts only on a GPU. Imports nothing."""
        installed = importlib.util.find_spec("transformer_engine") is not None
        return cls(device, installed and device == "cuda")


@dataclass(frozen=True)
class Change:
    """One change to upstream.

    Attributes:
        name: short and stable; what the log shows.
        kind: see `Kind`.
        symptom: what happens without it.
        versions: distribution name -> specifier of the versions it was tested with.
        when: whether a platform needs it.
    """

    name: str
    kind: Kind
    symptom: str
    versions: dict[str, str]
    when: Callable[[Platform], bool]

    def untested(self) -> list[str]:
        """The installed versions that it was not tested with, in words; empty if there are none."""
        untested = []
        for distribution, tested in self.versions.items():
            version = installed_version(distribution)
            if version is None:
                untested.append(f"{distribution} is not installed (tested: {tested})")
            elif version not in SpecifierSet(tested, prereleases=True):
                untested.append(f"{distribution} {version} (tested: {tested})")
        return untested

    def wanted(self, platform: Platform) -> bool:
        """Whether it is made: the platform needs it, and the versions are tested or the switch is on."""
        return self.when(platform) and (allowed_untested() or not self.untested())


@dataclass(frozen=True)
class Patch(Change):
    """A change that `apply` makes.

    Attributes:
        apply: makes the change.
    """

    apply: Callable[[], None]


REGISTRY: dict[str, Patch] = {}


def everywhere(platform: Platform) -> bool:
    """The condition of a change that every platform needs."""
    return True


def on_cpu(platform: Platform) -> bool:
    """The condition of a change for machines without a GPU."""
    return platform.device == "cpu"


def on_gpu(platform: Platform) -> bool:
    """The condition of a change for GPUs."""
    return platform.device == "cuda"


def without_te(platform: Platform) -> bool:
    """The condition of a change to what Megatron does without Transformer Engine."""
    return not platform.transformer_engine


def patch(
    name: str,
    *,
    kind: Kind,
    symptom: str,
    versions: dict[str, str],
    when: Callable[[Platform], bool] = everywhere,
) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Register the decorated function as the patch `name`; see `Change` for the arguments.

    Raises:
        ValueError: there is a patch of that name.
    """

    def register(apply: Callable[[], None]) -> Callable[[], None]:
        if name in REGISTRY:
            raise ValueError(f"two patches are called {name}")
        REGISTRY[name] = Patch(name, kind, symptom, versions, when, apply)
        return apply

    return register


def replace(owner: object, **replacements: object) -> None:
    """Put `replacements` in the place of attributes of upstream's module or class, whose types they need not have."""
    for name, value in replacements.items():
        setattr(owner, name, value)


def require(*changes: Change) -> None:
    """Refuse versions of upstream that one of the changes was not tested with, unless the switch is on.

    Raises:
        UserError: naming the changes, the versions, and what to do.
    """
    untested = [change for change in changes if change.untested()]
    if not untested or allowed_untested():
        return
    lines = "\n".join(f"  {change.name}: {change.symptom}" for change in untested)
    raise UserError(
        f"untested versions: {versions_of(untested)}. What this project changes in them was not tested with these, and "
        f"without it a run would be wrong or lost:\n{lines}\n"
        f"Install the tested versions (make setup, or uv sync), or set the environment variable {UNTESTED}=1 to make "
        "these changes all the same"
    )


def versions_of(changes: Iterable[Change]) -> str:
    """The untested versions of several changes in words, each once."""
    versions: dict[str, None] = {}
    for change in changes:
        versions |= dict.fromkeys(change.untested())
    return ", ".join(versions)


def allowed_untested() -> bool:
    """Whether the switch is on."""
    return os.environ.get(UNTESTED) == "1"


@cache
def installed_version(distribution: str) -> str | None:
    """The installed version; None if there is none."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
