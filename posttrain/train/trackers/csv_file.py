"""Numbers as comma-separated values, for spreadsheets and data frames."""

import csv
import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.train.trackers.tracker import TrackedRun, Tracker
from posttrain.utils import rundir

FILE = "metrics.csv"  # in a run directory


@dataclass
class Csv(Tracker):
    """RUN_DIR/metrics.csv: a row for each point, with a column for each name; answers are in samples.jsonl."""

    def start(self, run: TrackedRun) -> None:
        self.directory: Path = run.directory
        self.columns = ["step"]
        if run.resumed is None:
            self.write([])
            return
        resumed_after = run.resumed.step
        self.write([row for row in self.read() if row["step"].isdecimal() and int(row["step"]) < resumed_after])
        for point in run.resumed.points:
            self.log(resumed_after, point)

    def log(self, step: int, values: dict[str, float]) -> None:
        row = {"step": step, **values}
        if row.keys() <= set(self.columns):
            with os.fdopen(rundir.append(self.directory, FILE), "a", encoding="utf-8", newline="") as file:
                csv.DictWriter(file, self.columns).writerow(row)
        else:
            self.write([*self.read(), row])

    def finish(self, summary: dict[str, Any]) -> str | None:
        return f"csv: {self.directory / FILE}"

    def read(self) -> list[dict[str, Any]]:
        """The rows so far."""
        if not rundir.is_file(self.directory, FILE):
            return []
        text = rundir.read_text(self.directory, FILE, rundir.LONG, errors="replace")
        return [row for row in csv.DictReader(io.StringIO(text)) if row.get("step")]

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Replace the file: there are names that it has no columns for."""
        for row in rows:
            self.columns += [name for name in row if name not in self.columns]
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self.columns)
        writer.writeheader()
        writer.writerows(rows)
        rundir.write_text(self.directory, FILE, text.getvalue())
