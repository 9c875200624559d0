"""Scores of one answer against its reference; the objects of the config group `metric`."""

import re
from dataclasses import dataclass

from posttrain.errors import UserError


@dataclass
class ExactMatch:
    """1.0 where answer and reference say the same, else 0.0.

    Attributes:
        extract: regular expression of the part that is compared: its first group, or all of it, where it matches last.
            None: the whole text without white space at its ends.
        ignore_case: whether capital and small letters are the same.
    """

    extract: str | None = None
    ignore_case: bool = False

    def __post_init__(self) -> None:
        try:
            self._pattern = re.compile(self.extract) if self.extract is not None else None
        except re.error as error:
            raise UserError(f"metric.extract={self.extract}: not a regular expression: {error}") from None

    def __call__(self, answer: str, reference: str) -> float:
        found, wanted = self._part(answer), self._part(reference)
        return float(found is not None and found == wanted)

    def _part(self, text: str) -> str | None:
        if self.ignore_case:
            text = text.casefold()
        if self._pattern is None:
            return text.strip()
        found = list(self._pattern.finditer(text))
        return found[-1][1 if self._pattern.groups else 0].strip() if found else None
