"""What an object of `data.format` can do: one of two things, both with rows as posttrain.data.readers gives them."""

from collections.abc import Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

from posttrain.data.conversation import Conversation, Document, RowError
from posttrain.data.readers import Place, Row


@runtime_checkable
class RowFormat(Protocol):
    """Conversations that a row has by itself."""

    def conversations(self, row: Mapping[str, Any]) -> Iterable[Conversation]:
        """Read a row.

        Raises:
            RowError: it isn't valid.
        """
        ...


@runtime_checkable
class FileFormat(Protocol):
    """Conversations, or documents, that may span rows."""

    def read(self, rows: Iterable[Row]) -> Iterable[tuple[Place, Conversation | Document | RowError]]:
        """Read all rows; what can't be used is handed on as its error."""
        ...


Format = RowFormat | FileFormat
