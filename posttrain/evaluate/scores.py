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
            its last match, in the dialect of Python and of the regex package. None: the whole text,
            without white space at its ends.
        ignore_case: whether capital and small letters are the same.
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
            self._pattern = regex.compile(self.extract)
        except (regex.error, RecursionError, MemoryError, OverflowError) as error:
            raise UserError(f"metric.extract={self.extract}: not a regular expression: {error}") from None

    def __call__(self, answer: str, reference: str) -> float:
        extracted = self._extract(answer)
        return float(extracted is not None and extracted == self._extract(reference))

    def _extract(self, text: str) -> str | None:
        if self.ignore_case:
            text = text.casefold()
        if self._pattern is None:
            return text.strip()
        last = None
        try:
            for match in self._pattern.finditer(text, timeout=SECONDS):
                last = match
        except TimeoutError:
            raise UserError(
                f"metric.extract={self.extract}: takes more than {SECONDS:g} s for the text {text[:80]!r}; repetitions "
                "within repetitions, such as (a+)+, try every division of a text"
            ) from None
        if last is None:
            return None
        group = 1 if self._pattern.groups else 0
        found: str | None = last[group]
        return None if found is None else found.strip()
