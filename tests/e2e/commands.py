"""Commands in processes of their own, for the tests of this folder."""

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Result:
    """A finished command."""

    code: int
    out: str
    err: str
    run_dir: Path

    @property
    def summary(self) -> dict:
        return json.loads((self.run_dir / "summary.json").read_text())

    @property
    def metrics(self) -> list[dict]:
        return [json.loads(line) for line in (self.run_dir / "metrics.jsonl").read_text().splitlines()]

    @property
    def losses(self) -> list[float]:
        return [line["loss"] for line in self.metrics if "loss" in line]

    def log(self, rank: int = 0) -> str:
        path = self.run_dir / "logs" / f"rank{rank}.log"
        return path.read_text() if path.exists() else ""


def environment(cache: Path) -> dict[str, str]:
    """The test's own environment with this checkout importable, a cache of its own and one thread per process."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {
        **os.environ, "PYTHONPATH": path, "POSTTRAIN_CACHE": str(cache), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip


def finish(process, run_dir):
    """Wait for the end; nothing may be left running."""
    out, err = process.communicate(timeout=120)
    deadline = time.monotonic() + 60
    while left := [p for p in psutil.process_iter(["cmdline"]) if str(run_dir) in " ".join(p.info["cmdline"] or [])]:
        assert time.monotonic() < deadline, left
        time.sleep(0.2)
    return Result(process.returncode, out, err, run_dir)


def workers(process):
    """The ranks' processes, by rank; one that was started before the run was composed isn't told until later."""
    children = psutil.Process(process.pid).children()
    return sorted(children, key=lambda child: int(child.environ().get("RANK", 0)))
