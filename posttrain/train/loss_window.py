"""Means of an objective's metrics over the steps between two logged ones."""

from collections.abc import Mapping

import torch

from posttrain.checkpoint.progress import Progress
from posttrain.train.validation import from_last_stage

STEPS = "steps"  # beside the columns: how many were added up


class LossWindow:
    """Adds up each step's metrics where they are; only `collect` and `take` wait for the device.

    Args:
        columns: names in the forward step's report -> columns.
        progress: of the run; keeps the sums of a window in which a checkpoint is saved.
    """

    def __init__(self, columns: Mapping[str, str], progress: Progress) -> None:
        self.columns = columns
        self.progress = progress
        self.sums: dict[str, torch.Tensor] = {}
        self.steps = 0

    def add(self, report: Mapping[str, torch.Tensor]) -> None:
        """Add a step; its report is empty on all pipeline stages but the last."""
        self.steps += 1
        for name in self.columns:
            if name in report:
                value = report[name].detach().double()
                self.sums[name] = self.sums[name] + value if name in self.sums else value.clone()

    def collect(self) -> None:
        """Bring the sums into the progress; a collective call."""
        if not self.steps:
            return
        window = self.progress.window
        for name, column in self.columns.items():
            window[column] = window.get(column, 0.0) + from_last_stage(self.sums.get(name))
        window[STEPS] = window.get(STEPS, 0.0) + self.steps
        self.sums = {}
        self.steps = 0

    def take(self) -> dict[str, float]:
        """The means over the steps since the last call, by column; empty where no step was added. A collective call."""
        self.collect()
        window = self.progress.window
        self.progress.window = {}
        steps = window.pop(STEPS, 0.0)
        return {column: total / steps for column, total in window.items()}
