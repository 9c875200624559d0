"""How long each part of a run's start takes, from the command to the end of the first step."""

from posttrain.utils import boot_clock


class StartupClock:
    """Marks the ends of its parts, one after another.

    Args:
        began: when the command was started, in seconds of `boot_clock`.

    Attributes:
        seconds: part -> how long it took.
    """

    def __init__(self, began: float) -> None:
        self.last = began
        self.seconds: dict[str, float] = {}

    @property
    def total(self) -> float:
        """Seconds of all parts so far."""
        return sum(self.seconds.values())

    def mark(self, part: str) -> None:
        """`part` ends now; it began where the one before it ended."""
        now = boot_clock.now()
        self.seconds[part] = round(self.seconds.get(part, 0.0) + now - self.last, 2)
        self.last = now
