"""What a row holds that nobody reads: columns that a format passes over, and what their names say about them.

The rule: what a row holds is in the text that is trained or shown to the model, or is known to be metadata, or is named
in the data's report; a whole message, call, tool definition or reasoning that is lost is refused. This module follows a
row to its conversation (`TracedRow`), `posttrain.data.presence` the conversation to its text.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from posttrain.data.conversation import RowError

# A row's own variables of the chat template, as TRL names them.
VARIABLES = "chat_template_kwargs"
# Names of metadata, and how such names end.
METADATA = frozenset(
    {
        *("id", "ids", "uid", "uuid", "guid", "idx", "index", "hash", "name", "type"),
        *("", "__index_level_0__"),  # the index of pandas in CSV and Parquet; read again it is `Unnamed: 0`
        *("time", "timestamp", "date", "created", "updated"),
    }
)
METADATA_ENDS = ("_id", "_ids", "_uuid", "_idx", "_index", "_at", "_time", "_timestamp", "_date", "_hash")
# Spellings of an answer's reasoning. Messages have the first here, Qwen's and DeepSeek's; then gpt-oss's and Ollama's,
# and that of servers.
REASONING = ("reasoning_content", "thinking", "reasoning")
SEEN_OR_HEARD = frozenset({"image", "images", "audio", "audios", "video", "videos"})
# Names of what is said: losing it makes another conversation.
SPOKEN = frozenset(
    {
        *REASONING,
        *SEEN_OR_HEARD,
        *("thought", "thoughts", "thinking_content", "reasoning_details", "chain_of_thought", "cot"),
        *("system", "system_prompt", "system_message", "developer", "developer_prompt"),
        *("tools", "functions", "tool_definitions", "available_tools", "tool_defs", "tool_schemas", "tools_json"),
        *("tool_schema", "function_definitions", "functions_json"),
        *("tool_calls", "tool_call", "function_call", "function_calls", "tool_plan"),
        *("messages", "conversations", "conversation", "dialog", "dialogue", "turns", "history"),
        "refusal",
    }
)
# Keys for whether a message is trained: OpenAI's and Mistral's, ours, axolotl's, and further ones.
WEIGHTS = ("weight", "loss", "loss_weight", "loss_mask", "train", "training", "trainable")
# Keys that say so too, and are not known: parts of a message, and those that say the opposite in some programs.
UNKNOWN_WEIGHTS = ("train_detail", "mask", "masked", "loss_scale")
NOTHING = ("", "[]", "{}")  # texts that hold nothing, the last two as JSON in a column of texts
LONG = 16  # characters from which a text that is found in another is no coincidence


class TracedRow(dict[str, Any]):
    """A row that knows which of its columns were looked at; the columns within a column as well."""

    __slots__ = ("nested", "read")

    def __init__(self, row: Mapping[str, Any]) -> None:
        super().__init__(row)
        self.read: set[str] = set()
        self.nested = False  # whether a column that was looked at has columns itself

    def __getitem__(self, name: str) -> Any:
        value = dict.__getitem__(self, name)
        self.read.add(name)
        if type(value) is dict:
            value = TracedRow(value)
            dict.__setitem__(self, name, value)
            self.nested = True
        return value

    def get(self, name: str, default: Any = None) -> Any:
        if name not in self:
            return default
        return self[name]

    def items(self) -> Any:
        self.read.update(self)
        return super().items()

    def values(self) -> Any:
        self.read.update(self)
        return super().values()

    def __iter__(self) -> Iterator[str]:
        return super().__iter__()  # Python's own copying then asks for each value, and is seen

    def unread(self, metadata: Collection[str] = ()) -> dict[str, Any]:
        """The columns that hold something and weren't looked at, but for metadata; `a.b` is b within a."""
        columns: dict[str, Any] = {}
        if len(self.read) == len(self) and not self.nested:
            return columns
        for name, value in dict.items(self):
            if name not in self.read:
                if name not in metadata and not is_metadata(name) and holds(value):
                    columns[name] = value
            elif type(value) is TracedRow:
                for inner, part in value.unread().items():
                    if f"{name}.{inner}" not in metadata:
                        columns[f"{name}.{inner}"] = part
        return columns


def is_metadata(name: str) -> bool:
    """Whether a key of this name says something about a row or message, and isn't said in it."""
    name = str(name).lower()
    return name in METADATA or name.endswith(METADATA_ENDS) or name.startswith("unnamed: ")


def is_spoken(name: str) -> bool:
    """Whether a column of this name, or the last part of a path, is said in a conversation."""
    return name.rpartition(".")[2].lower() in SPOKEN


def is_seen_or_heard(name: str) -> bool:
    """Whether a column of this name, or the last part of a path, is no text."""
    return name.rpartition(".")[2].lower() in SEEN_OR_HEARD


def holds(value: object) -> bool:
    """Whether a value has anything in it: no null, blank text, empty JSON, or container of these."""
    if value is None:
        return False
    if isinstance(value, str):
        return value.strip() not in NOTHING
    if isinstance(value, Mapping):
        return any(holds(item) for item in value.values())
    if isinstance(value, list | tuple):
        return any(map(holds, value))
    return True


def texts(value: object) -> Iterator[str]:
    """Every text within a value that is not metadata, without the spaces around it."""
    if isinstance(value, str):
        if value.strip():
            yield value.strip()
    elif isinstance(value, Mapping):
        for name, item in value.items():
            if not is_metadata(name):
                yield from texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from texts(item)


def check_row_weight(row: Mapping[str, Any], unread: Collection[str]) -> None:
    """Refuse a row that says of itself that it counts another weight than every other.

    Args:
        row: the row.
        unread: its columns that the format doesn't read.

    Raises:
        RowError: naming the column.
    """
    for name in WEIGHTS:
        if name in unread and row[name] not in (1, True, "1", "true", "True"):
            raise RowError(
                f"field `{name}`: {row[name]!r} of a whole row has no effect: give messages a weight of 0 or 1, or "
                f"data.sources a weight; data.format.metadata=[{name}] says that it is none",
                f"a row's `{name}` is not 1",
            )
    if "label" in unread and row["label"] is False:
        raise RowError(
            "field `label`: false says that this answer is a bad one, as KTO's data has it; leave such rows out, or "
            "say with data.format.metadata=[label] that it is something else",
            "a row's `label` is false",
        )
