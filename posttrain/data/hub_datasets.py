"""Data sets of the Hugging Face hub, by name: `hf://owner/name`, with `:configuration` and `@split` if needed."""

from collections.abc import Iterator
from typing import NamedTuple

from posttrain.data.arrow_values import plain_row
from posttrain.data.readers import HUB, Place, Row
from posttrain.errors import UserError
from posttrain.utils import hub


class HubDataset(NamedTuple):
    """What a name says: repository, configuration (empty: its only one) and split."""

    repository: str
    configuration: str
    split: str


def parse(name: str) -> HubDataset:
    """The parts of `hf://owner/name:configuration@split`."""
    target, _, split = name.removeprefix(HUB).partition("@")
    repository, _, configuration = target.partition(":")
    return HubDataset(repository, configuration, split or "train")


def revision(name: str, key: str) -> str:
    """The commit of a data set, which is part of the cache's key.

    Args:
        name: `hf://...`.
        key: that has it, for errors.

    Raises:
        UserError: the hub has no such data set for this user, or doesn't answer in time.
    """
    try:
        return hub.revision(parse(name).repository, "dataset")
    except hub.HubError as error:
        raise UserError(f"{key}={name}: {error}") from None


def rows(name: str) -> Iterator[Row]:
    """Stream the rows of a data set.

    Raises:
        UserError: it can't be reached or does not exist.
    """
    from datasets import load_dataset
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    repository, configuration, split = parse(name)
    try:
        validate_repo_id(repository)  # load_dataset would take a folder's path as well
        data = load_dataset(repository, configuration or None, split=split, streaming=True)
        for index, row in enumerate(data):
            yield Place(name, index, f"row {index}"), plain_row(row)
    except hub.ERRORS as error:
        raise UserError(f"data.path={name}: {hub.explain(error, repository, 'dataset')}") from None
    except (ValueError, RuntimeError) as error:
        raise UserError(f"data.path={name}: can't be read from the hub: {str(error).splitlines()[0]}") from None
