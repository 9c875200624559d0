"""Models of the Hugging Face hub."""

import os
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

from posttrain.errors import NoSuchModel


def download(name: str, patterns: list[str]) -> Path:
    """The directory of the model `name`, with the files that match `patterns`.

    Raises:
        NoSuchModel: the hub does not give it.
    """
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except GatedRepoError:
        reason = "is gated: accept its licence on its hub page, then set HF_TOKEN"
    except RepositoryNotFoundError:
        reason = "is neither a directory here nor a model on the hub (private ones need HF_TOKEN)"
    except LocalEntryNotFoundError:
        offline = "the hub cannot be reached"
        if os.environ.get("HF_HUB_OFFLINE"):
            offline = "HF_HUB_OFFLINE is set"
        reason = f"is not a directory here nor in the hub's cache, and {offline}"
    except (HfHubHTTPError, OSError) as error:
        reason = f"cannot be downloaded: {error}"
    raise NoSuchModel(reason, f"model.path={name}: {reason}; give a directory with a model, or a hub id")
