"""`trainer.on_nonfinite=rollback`: a run goes back to its newest checkpoint and leaves out the rows that spoiled it.

The ranks write down which rows, and end; the launcher starts them again, as after a lost rank. No torch here.
"""

import time
from operator import itemgetter
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
        return list(map(parse, rundir.read_json(run_dir, FILE)))
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
        raise UserError(f"{run_dir / FILE}: damaged ({error}); remove it to train on all rows again") from None


def parse(record: dict[str, Any]) -> dict[str, Any]:
    """One rollback of the file, with every value of its type."""
    return {
        "step": int(record["step"]),
        "to": int(record["to"]),
        "why": str(record["why"]),
        "time": float(record["time"]),
        "skip": list(map(int, record["skip"])),
    }


def merged(saved: list[dict[str, Any]], written: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that a checkpoint knows of and those written since, each once."""
    by_rows = {}
    for record in [*saved, *written]:
        by_rows[(record["step"], *record["skip"])] = record
    return sorted(by_rows.values(), key=itemgetter("time"))


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
    places: set[int] = set()
    for rollback in rollbacks:
        places.update(rollback["skip"])
    return sorted(places)
