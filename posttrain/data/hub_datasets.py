"""Data sets of the Hugging Face hub."""

from collections.abc import Iterator

from datasets import load_dataset
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.utils._validators import validate_repo_id

from posttrain.data.arrow_values import plain_row
from posttrain.data.readers import HUB, Place, Row
from posttrain.errors import UserError


def rows(name: str) -> Iterator[Row]:
    """Stream a data set of the hub: `hf://owner/name`, with `:configuration` and `@split` (default: train) if needed.

    Raises:
        UserError: it can't be reached or does not exist.
    """
    target, _, split = name.removeprefix(HUB).partition("@")
    owner_name, _, configuration = target.partition(":")
    try:
        validate_repo_id(owner_name)  # load_dataset would take a folder's path as well
        data = load_dataset(owner_name, configuration or None, split=split or "train", streaming=True)
        for index, row in enumerate(data):
            yield Place(name, index, f"row {index}"), plain_row(row)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"data.path={name}: can't be read from the hub: {str(error).splitlines()[0]}") from None


def revision(name: str) -> str:
    """The commit of a hub data set, part of the cache's key.

    Raises:
        UserError: it can't be reached or does not exist.
    """
    owner_name = name.removeprefix(HUB).partition("@")[0].partition(":")[0]
    try:
        return str(HfApi().dataset_info(owner_name).sha)
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError, ValueError) as error:
        raise UserError(f"data.path={name}: the hub does not answer: {str(error).splitlines()[0]}") from None
