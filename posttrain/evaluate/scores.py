"""Scores of one answer against its reference; the objects of the config group `metric`."""

from collections.abc import Callable
from dataclasses import dataclass

import regex

from posttrain.errors import UserError

Metric = Callable[[str, str], float]  # (answer, reference) -> score
LONGEST = 1000  # characters of an expression
SECONDS = 1.0  # for the matches in one text; regex looks at the clock now and then only, so it may take some more


@dataclass
class ExactMatch:
    """1.0 where answer and reference are equal, else 0.0.

    Attributes:
        extract: regular expression of the part that is compared: its first group, or all of it, at
            its last match that isn't empty, in the dialect of Python and of the regex package. A
            reference without a match is compared as a whole, an answer without one is wrong. None:
            the whole text. White space at the ends is taken off after that.
        ignore_case: whether capital and small letters are the same, to the expression too.
    """

    extract: str | None = None
    ignore_case: bool = False

    def __post_init__(self) -> None:
        self._pattern = None
        if self.extract is None:
            return
        if len(self.extract) > LONGEST:
            raise UserError(f"metric.extract: a regular expression of more than {LONGEST} characters")
        try:
            self._pattern = regex.compile(self.extract, regex.IGNORECASE if self.ignore_case else 0)
        except (regex.error, RecursionError, MemoryError, OverflowError) as error:
            raise UserError(f"metric.extract={self.extract}: not a regular expression: {error}") from None

    def __call__(self, answer: str, reference: str) -> float:
        found = self._extract(answer)
        expected = self._extract(reference)
        if expected is None:
            expected = reference
        return float(found is not None and self._normal(found) == self._normal(expected))

    def _normal(self, text: str) -> str:
        if self.ignore_case:
            text = text.casefold()
        return text.strip()

    def _extract(self, text: str) -> str | None:
        if self._pattern is None:
            return text
        group = 1 if self._pattern.groups else 0
        last: str | None = None
        try:
            for match in self._pattern.finditer(text, timeout=SECONDS):
                last = match[group] or last
        except TimeoutError:
            raise UserError(
                f"metric.extract={self.extract}: takes more than {SECONDS:g} s for the text {text[:80]!r}; repetitions "
                "within repetitions, such as (a+)+, try every division of a text"
            ) from None
        return last
