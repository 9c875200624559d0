"""Which messages are trained, and what happens to a conversation that is too long or broken."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Rules:
    """What to do with a conversation; see `posttrain.data.TrainingData` for the words."""

    train_on: str
    max_length: int
    truncation: str
    truncation_side: str
    on_error: str
    split_turns: str = "never"
