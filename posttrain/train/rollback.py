"""`trainer.on_nonfinite=rollback`: a run goes back to its newest checkpoint and leaves out the rows that spoiled it.

The ranks write down which rows, and end; the launcher starts them again, as after a lost rank. No torch here.
"""

import time
from pathlib import Path
from typing import Any

from posttrain.errors import UserError
from posttrain.utils import rundir

FILE = "rollbacks.json"  # in a run directory: a list of what `record` writes


class RolledBack(Exception):
    """Raised by every rank: the run is to be started again from its newest checkpoint."""


def read(run_dir: Path) -> list[dict[str, Any]]:
    """The rollbacks of a run so far, the oldest first."""
    try:
        found = rundir.read_json(run_dir, FILE)
        return [{"step": int(one["step"]), "to": int(one["to"]), "why": str(one["why"]), "time": float(one["time"]),
                 "skip": [int(place) for place in one["skip"]]} for one in found]  # fmt: skip
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
        raise UserError(f"{run_dir / FILE}: damaged ({error}); remove it to train on all rows again") from None


def merged(saved: list[dict[str, Any]], written: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that a checkpoint knows of and those written since, each once."""
    found = {(one["step"], *one["skip"]): one for one in [*saved, *written]}
    return sorted(found.values(), key=lambda one: one["time"])


def record(run_dir: Path, before: list[dict[str, Any]], step: int, to: int, why: str, skip: list[int]) -> None:
    """Add a rollback to those `before`.

    Args:
        step: whose numbers were bad.
        to: the step that the run resumes after.
        why: in words.
        skip: first places, in the order of the rows, of the global batches that are left out.
    """
    one = {"step": step, "to": to, "why": why, "skip": skip, "time": round(time.time(), 3)}
    rundir.write_json(run_dir, FILE, [*before, one])


def skipped(rollbacks: list[dict[str, Any]]) -> list[int]:
    """First places of all global batches that are left out, ascending."""
    return sorted({place for one in rollbacks for place in one["skip"]})
