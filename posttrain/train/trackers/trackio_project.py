"""Trackio, whose dashboard runs on this machine or in a Space of the hub."""

from dataclasses import dataclass
from typing import Any

from posttrain.train.trackers.tracker import TrackedRun, Tracker, require


@dataclass
class Trackio(Tracker):
    """Trackio; its files are in TRACKIO_DIR, else ~/.cache/huggingface/trackio, unless a Space is named."""

    project: str | None = None
    space_id: str | None = None

    def check(self) -> None:
        require("trackio", "trackio")

    def start(self, run: TrackedRun) -> None:
        import trackio

        self.trackio = trackio
        self.run = trackio.init(
            project=self.project or "posttrain",
            name=run.name,
            group=run.group,
            space_id=self.space_id,
            config=run.recorded_config,
            resume="allow" if run.resumed else "never",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def log(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def table(self, step: int, name: str, rows: list[dict[str, str]]) -> None:
        data = [list(row.values()) for row in rows]
        self.run.log({name: self.trackio.Table(columns=list(rows[0]), data=data)}, step=step)

    def finish(self, summary: dict[str, Any]) -> str | None:
        self.run.finish()
        if self.run.url:
            return f"trackio: {self.run.url}"
        return f"trackio: kept on this machine; to look at it: trackio show --project {self.run.project}"
