"""Paths as a person writes them."""

from pathlib import Path

from posttrain.errors import UserError


def expand_home(path: str | Path) -> Path:
    """The path with a leading `~` or `~name` replaced by that user's home directory.

    Raises:
        UserError: there is no such user, or nothing says where the home directory is.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        user = Path(path).parts[0]
        raise UserError(
            f"{path}: {user} is the home directory of nobody on this machine; write the whole path, or ./{path} for a "
            "file of that name"
        ) from None
