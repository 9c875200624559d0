"""Models of the Hugging Face hub."""

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError

from posttrain.errors import NoSuchModel
from posttrain.utils import hub


def download(name: str, patterns: list[str], key: str) -> Path:
    """The directory of the model `name`, with the files that match `patterns`; from the cache where the hub gives none.

    Args:
        name: owner/name.
        patterns: of the files' names.
        key: that names the model, for errors.

    Raises:
        NoSuchModel: neither has it.
    """
    try:
        hub.revision(name, "model")
        return Path(snapshot_download(name, allow_patterns=patterns))
    except hub.HubError as error:
        answer = str(error)
    except hub.ERRORS as error:
        answer = hub.explain(error, name, "model")
    try:
        return Path(snapshot_download(name, allow_patterns=patterns, local_files_only=True))
    except LocalEntryNotFoundError:
        reason = f"is not a directory here nor in the hub's cache, and {answer}"
        raise NoSuchModel(reason, f"{key}={name}: {reason}; or give a directory: {key}=DIR") from None
