"""Apply the patches that a platform needs, in the order of catalogue.py, once per process."""

import logging

from posttrain.errors import UserError
from posttrain.patches import catalogue  # noqa: F401  (fills REGISTRY)
from posttrain.patches.elsewhere import CHANGES
from posttrain.patches.registry import (
    REGISTRY,
    UNTESTED,
    Change,
    Kind,
    Patch,
    Platform,
    allowed_untested,
    require,
)

log = logging.getLogger(__name__)

_applied: list[str] = []
_skipped: list[str] = []


def registered() -> list[Patch]:
    """Every patch, in the order in which they are applied."""
    return list(REGISTRY.values())


def applied() -> list[str]:
    """Names of the patches that this process has applied."""
    return list(_applied)


def apply(platform: Platform) -> list[str]:
    """Apply every patch that the platform needs and this process has not applied; return the names of all so far.

    Raises:
        UserError: see `check`; or a patch cannot be applied to a version that it was not tested with.
    """
    check(platform)
    for item in registered():
        if item.name in _applied or not item.when(platform):
            continue
        untested = ", ".join(item.untested())
        if not untested:
            item.apply()
        elif allowed_untested():
            log.warning("patch %s is applied to %s, because of %s=1", item.name, untested, UNTESTED)
            _apply_untested(item, untested)
        else:
            if item.name not in _skipped:
                _skipped.append(item.name)
                log.warning("patch %s is skipped: %s", item.name, untested)
            continue
        _applied.append(item.name)
    return applied()


def _apply_untested(item: Patch, untested: str) -> None:
    try:
        item.apply()
    except (AttributeError, ImportError) as error:
        raise UserError(
            f"the patch {item.name} does not fit {untested}: {error}; install the tested version (make setup)"
        ) from error


def check(platform: Platform) -> list[Change]:
    """Refuse versions of upstream that a run would be wrong or lost with. Imports nothing of upstream.

    Returns:
        The changes that are made to untested versions because the switch is on.

    Raises:
        UserError: a correctness change that this platform needs was not tested with what is installed.
    """
    needed = [change for change in (*registered(), *CHANGES) if change.when(platform) and change.untested()]
    if allowed_untested():
        return needed
    require(*(change for change in needed if change.kind is Kind.CORRECTNESS))
    return []
