"""Why a run ended: from the exit codes of the ranks here and the error files that ranks anywhere have left."""

import re
import shlex
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NotRequired, TypedDict

from posttrain.errors import Pruned, RunFailed, UserError
from posttrain.launch.signals import stopped
from posttrain.utils import rundir

ERROR_FILE = re.compile(r"rank\d+\.error\.json")


class RankError(TypedDict):
    """An error file.

    Attributes:
        rank: which.
        time: when it failed, seconds since the epoch.
        user_error: whether the user can fix it.
        message: what went wrong.
        killed: whether a signal killed it; then the launcher has written the file.
        rolled_back, pruned: whether the rank ended itself for that.
    """

    rank: int
    time: float
    user_error: bool
    message: str
    killed: NotRequired[bool]
    rolled_back: NotRequired[bool]
    pruned: NotRequired[bool]


def error_file(rank: int) -> str:
    """In a run directory: why a rank failed."""
    return f"logs/rank{rank}.error.json"


def error_files(run_dir: Path) -> list[str]:
    """Those of all ranks that failed."""
    return [f"logs/{name}" for name in rundir.names(run_dir, "logs") if ERROR_FILE.fullmatch(name)]


def record_killed(run_dir: Path, rank: int, code: int) -> None:
    """Record a killed rank, which cannot write its own error file; other machines of the run read it too.

    Args:
        run_dir: of the run.
        rank: which.
        code: its exit code, negative.
    """
    error: RankError = {
        "rank": rank,
        "time": time.time(),
        "user_error": False,
        "killed": True,
        "message": describe_exit(code),
    }
    rundir.write_json(run_dir, error_file(rank), error)


def describe_exit(code: int) -> str:
    """How a process ended, by its exit code."""
    if code >= 0:
        return f"ended with exit code {code}"
    hint = " (out of memory?)" if code == -signal.SIGKILL else ""
    return f"was killed by {signal.Signals(-code).name}{hint}"


def explain(run_dir: Path, codes: Mapping[int, int | None], signals: list[int], signalled_at: float) -> Exception:
    """The error of a run of which a rank has failed, or which has been stopped.

    Args:
        run_dir: of the run.
        codes: rank -> exit code, of the ranks on this machine; one of them is not 0.
        signals: that this command received, the first one first.
        signalled_at: when the first one came, seconds since the epoch.

    Returns:
        UserError, Pruned or RunFailed.
    """
    first = _first_error(run_dir)
    if first is not None and first["user_error"]:
        return UserError(first["message"])
    all_saved = all(code in (0, RunFailed.STOPPED) for code in codes.values())
    if first is not None and not signals:
        if first.get("rolled_back"):
            error = RunFailed(first["message"])
            error.rolled_back = True
            return error
        if first.get("pruned") and all_saved:
            return Pruned(first["message"])
    # A rank on another machine may have failed before.
    failed_first = first is not None and first["time"] < signalled_at
    if all_saved or (signals and not failed_first):
        return _stopped(run_dir, signals, all_saved)
    if first is not None:
        failed = "" if first.get("killed") else "failed: "
        return RunFailed(f"rank {first['rank']} {failed}{first['message']}\n  log: {_log(run_dir, first['rank'])}")
    rank, code = next((rank, code) for rank, code in codes.items() if code)
    return RunFailed(f"rank {rank} {describe_exit(code)}\n  log: {_log(run_dir, rank)}")


def _first_error(run_dir: Path) -> RankError | None:
    """The error that explains the others, by time; a killed rank explains lost connections noticed before."""
    errors: list[RankError] = [rundir.read_json(run_dir, name) for name in error_files(run_dir)]
    return min(errors, key=lambda error: (not error.get("killed"), error["time"]), default=None)


def _stopped(run_dir: Path, signals: list[int], saved: bool) -> RunFailed:
    """The error of a run that was told to stop, here or on another machine."""
    message = "stopped by {}" if signals else "stopped by a signal to another of its commands"
    if saved:
        command = f"python -m posttrain --resume {shlex.quote(str(run_dir))}"
        if (run_dir.parent / "multirun.yaml").exists():  # of a grid, whose command knows its directories
            command = "the same command"
        message += f" after saving; {command} resumes it"
    return stopped(signals[0] if signals else signal.SIGTERM, message)


def _log(run_dir: Path, rank: int) -> Path:
    return run_dir / "logs" / f"rank{rank}.log"
