"""File formats: what a row's fields mean. Each turns rows into conversations.

A format is an object with `conversations(row) -> iterable of Conversation`; one whose conversations
span several rows has `read(rows)` instead. Both raise `RowError` for a row that is not valid.
"""

from posttrain.data.formats.chat import Messages, ShareGPT
from posttrain.data.formats.columns import Alpaca, Dolly, PromptCompletion
from posttrain.data.formats.custom import Custom
from posttrain.data.formats.oasst import Oasst
from posttrain.data.formats.text import Text

__all__ = ["Alpaca", "Custom", "Dolly", "Messages", "Oasst", "PromptCompletion", "ShareGPT", "Text"]
