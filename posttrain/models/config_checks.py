"""Whether what a config.json says can be honoured; before anything is loaded."""

from collections.abc import Mapping
from typing import Any

from posttrain.errors import UserError
from posttrain.models.families import family_of, position_limit_of


def check_config(config: Mapping[str, Any], source: str) -> None:
    """Raise a UserError where a config.json says what would not be honoured.

    Of a family that isn't known nothing is refused: what its bridge makes of the fields is Megatron-Bridge's to say.

    Args:
        config: its fields.
        source: begins the error: the file, or the key in front of a field's name.
    """
    family = family_of(config)
    problem = family.problem(config) if family is not None else None
    if family is not None and problem is not None:
        raise UserError(f"{source}{problem} (model_type {family.model_type})")


def check_length(config: Mapping[str, Any], length: int) -> None:
    """Raise a UserError where sequences of `length` tokens are longer than a model with this config.json can have."""
    limit = position_limit_of(config)
    if limit is not None and length > limit:
        raise UserError(
            f"`trainer.seq_length={length}`: this model takes sequences up to {limit} tokens only; it has learned "
            "positions, or a rotary embedding that changes with the length of longer ones"
        )
