"""Exceptions whose message is for the person at the keyboard and is shown without a traceback."""

import errno

# Errors of a file or folder that a person has named, not of a mistake in this program.
LOCATION_ERRORS = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EEXIST,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENAMETOOLONG,
)


class UserError(Exception):
    """A wrong key, file or combination that the user can fix.

    Args:
        message: what is wrong, naming the configuration key or the file, and what to do about it.
    """

    exit_code = 2


class NoSuchModel(UserError):
    """A model's name leads to no directory here, and to nothing on the hub.

    Args:
        reason: what was found instead.
        message: the same with the name, and with what to do.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class RunFailed(Exception):
    """A run that started and did not finish.

    Attributes:
        exit_code: what the command exits with.
        restartable: whether starting again from the newest checkpoint may help.
        stopped: whether it was told to stop rather than failed.
        rolled_back: whether its ranks ended to be started again from the newest checkpoint (rollback.py).
    """

    STOPPED = 3  # exit code of a rank that saved and left because it was told to
    exit_code = 1
    restartable = True
    stopped = False
    rolled_back = False


class Pruned(RunFailed):
    """A trial of a sweep that ended itself because the others do better; it has saved, and has a validation loss."""

    restartable = False


class ExportRefused(RunFailed):
    """An exported directory is not what was trained; nothing was published."""

    restartable = False


def location_error(error: OSError) -> str | None:
    """A line about a file or folder that can't be written or read; None: the error is about something else."""
    if "No usable temporary directory" in str(error):
        return f"TMPDIR: no folder for temporary files can be written to ({error.strerror}); name one that can"
    if not error.filename or error.errno not in LOCATION_ERRORS:
        return None
    return f"{error.filename}: {error.strerror}"
