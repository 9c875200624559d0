"""OpenAssistant: trees of messages.

Nested, with one tree per row, or flat, with one message per row and its parent's id.
"""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from posttrain.data.conversation import Conversation, Message, RowError
from posttrain.data.formats.fields import ROLE_NAMES, FormatOptions, role, text
from posttrain.data.readers import Place, Row
from posttrain.data.trace import holds
from posttrain.errors import UserError


@dataclass(slots=True)
class _Node:
    place: Place
    message: Message
    rank: int
    parent: str | None
    replies: list["_Node"] = field(default_factory=list)


_UNRANKED = 1 << 30
# What OpenAssistant's exports hold of a message besides what is read here: who wrote it, when, and how it was judged.
_KNOWN = frozenset(
    {
        *("role", "text", "rank", "replies", "message_id", "parent_id", "user_id", "message_tree_id", "tree_state"),
        *("created_date", "lang", "deleted", "synthetic", "review_count", "review_result", "emojis", "labels"),
        *("events", "detoxify", "model_name"),
    }
)


@dataclass
class Oasst(FormatOptions):
    """Trees of prompts and ranked replies.

    Attributes:
        branches: which paths from the root become conversations: "best" follows the best-ranked
            reply at each message (unranked ones last, in file order) and gives one per tree; "all"
            gives one per leaf. A path ends with its last assistant message.
    """

    branches: str = "best"

    def read(self, rows: Iterable[Row]) -> Iterator[tuple[Place, Conversation | RowError]]:
        """Yield the conversations of every tree. Flat files are held in memory, nested ones row by row."""
        if self.branches not in ("best", "all"):
            raise UserError(f"data.format.branches={self.branches}: must be best or all")
        flat: dict[str, _Node] = {}
        for place, row in rows:
            try:
                if isinstance(row, RowError):
                    raise row
                if "prompt" in row:
                    if not isinstance(row["prompt"], dict):
                        raise RowError("field `prompt`: expected the tree's first message", "field `prompt`")
                    yield from self._paths(_nested(row["prompt"], place, self.metadata))
                elif not row.get("deleted"):
                    node = _node(row, place, self.metadata)
                    if flat.setdefault(text(row, "message_id"), node) is not node:
                        raise RowError("field `message_id`: is another message's too", "a message_id twice")
            except RowError as error:
                yield place, error
        roots = []
        for node in flat.values():
            if node.parent is None:
                roots.append(node)
            elif node.parent in flat:
                flat[node.parent].replies.append(node)
            else:
                reason = f"its parent {node.parent} is not in the file"
                yield node.place, RowError(reason, "a parent is not in the file")
        reached = set(map(id, roots))
        for root in roots:
            yield from self._paths(root)
            stack = [root]
            while stack:
                replies = stack.pop().replies
                reached.update(map(id, replies))
                stack += replies
        for node in flat.values():
            if id(node) not in reached and node.parent in flat:
                yield node.place, RowError("its parents are its own replies, in a circle", "a circle of parents")

    def _paths(self, root: _Node) -> Iterator[tuple[Place, Conversation | RowError]]:
        """The conversations of one tree, without recursion: trees may be deep."""
        seen = set()  # ids of last messages: paths that differ after them are the same conversation
        tree = root.place.digest()
        stack = [[root]]
        while stack:
            path = stack.pop()
            replies = sorted(path[-1].replies, key=lambda node: node.rank)
            if replies and self.branches == "best":
                stack.append([*path, replies[0]])
                continue
            if replies:
                for reply in reversed(replies):
                    stack.append([*path, reply])
                continue
            while path and path[-1].message.role != "assistant":
                path.pop()
            if not path:
                error = RowError("no assistant message on this path of the tree", "a path without an answer")
                yield root.place, error
            elif id(path[-1]) not in seen:
                seen.add(id(path[-1]))
                yield root.place, Conversation([node.message for node in path], tree=tree)


def _node(row: dict[str, Any], place: Place, metadata: Collection[str]) -> _Node:
    rank = row.get("rank")
    if rank is not None and not isinstance(rank, int | float):
        raise RowError(
            f"field `rank`: expected a number or null, found {rank!r}",
            "field `rank` is not a number",
        )
    message = Message(role(row.get("role"), "role", ROLE_NAMES), text(row, "text"))
    for name, value in row.items():
        if name not in _KNOWN and name not in metadata and holds(value):
            message.extra[name] = value
    if rank is None:
        rank = _UNRANKED
    return _Node(place, message, int(rank), row.get("parent_id"))


def _nested(row: dict[str, Any], place: Place, metadata: Collection[str]) -> _Node:
    root = _node(row, place, metadata)
    stack = [(root, row)]
    while stack:
        node, fields = stack.pop()
        replies = fields.get("replies") or []
        if not isinstance(replies, list):
            raise RowError("field `replies`: expected a list of messages", "field `replies` is not a list")
        for reply in replies:
            if not isinstance(reply, dict):
                raise RowError("field `replies`: expected messages", "field `replies` holds something else")
            if not reply.get("deleted"):
                child = _node(reply, place, metadata)
                node.replies.append(child)
                stack.append((child, reply))
    return root
