"""Scores of one answer against its reference; the objects of the config group `metric`."""

import re
from collections.abc import Callable
from dataclasses import dataclass

from posttrain.errors import UserError

Metric = Callable[[str, str], float]  # (answer, reference) -> score


@dataclass
class ExactMatch:
    """1.0 where answer and reference are equal, else 0.0.

    Attributes:
        extract: regular expression of the part that is compared: its first group, or all of it, at
            its last match. None: the whole text, without white space at its ends.
        ignore_case: whether capital and small letters are the same.
    """

    extract: str | None = None
    ignore_case: bool = False

    def __post_init__(self) -> None:
        self._pattern = None
        if self.extract is None:
            return
        try:
            self._pattern = re.compile(self.extract)
        except re.error as error:
            raise UserError(f"metric.extract={self.extract}: not a regular expression: {error}") from None

    def __call__(self, answer: str, reference: str) -> float:
        extracted = self._extract(answer)
        return float(extracted is not None and extracted == self._extract(reference))

    def _extract(self, text: str) -> str | None:
        if self.ignore_case:
            text = text.casefold()
        if self._pattern is None:
            return text.strip()
        matches = list(self._pattern.finditer(text))
        if not matches:
            return None
        group = 1 if self._pattern.groups else 0
        return matches[-1][group].strip()
