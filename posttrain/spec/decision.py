"""A decision with its reason."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Decision:
    """Whether something is done, and why or why not; true where it is done."""

    on: bool
    reason: str

    def __bool__(self) -> bool:
        return self.on

    def __str__(self) -> str:
        return f"on, {self.reason}" if self.on else f"off, {self.reason}"


def unless(*obstacles: tuple[bool, str], on: str) -> Decision:
    """Off for the first obstacle that is there, else on.

    Args:
        obstacles: (whether it is there, what it is).
        on: why it is done where none is.
    """
    for there, reason in obstacles:
        if there:
            return Decision(False, reason)
    return Decision(True, on)
