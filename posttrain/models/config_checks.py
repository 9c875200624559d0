"""Whether what a config.json says can be honoured; before anything is loaded."""

from collections.abc import Mapping
from typing import Any

from posttrain.errors import UserError
from posttrain.models.families import family_of, family_with, position_limit_of
from posttrain.models.families.family import ModelFamily
from posttrain.utils.escape import escape_control

# Features of a head up to which Transformer Engine's attention of packed rows is right. With wider ones cuDNN's
# gradients (9.x, Hopper) are off by a fifth, and not finite where queries share keys; the forward pass is right, and so
# are the gradients of rows without boundaries.
WIDEST_PACKED_HEAD = 128


def check_config(config: Mapping[str, Any], source: str) -> None:
    """Raise a UserError where a config.json says what would not be honoured.

    Of a family that isn't known nothing is refused: what its bridge makes of the fields is Megatron-Bridge's to say.

    Args:
        config: its fields.
        source: begins the error: the file, or the key in front of a field's name.
    """
    family = family_of(config)
    if family is None:
        return
    problem = _problem_of_classes(config, family) or family.problem(config)
    if problem is not None:
        raise UserError(f"{source}{problem} (model_type {family.model_type})")


def _problem_of_classes(config: Mapping[str, Any], family: ModelFamily) -> str | None:
    """What is wrong with the classes that a config.json names.

    transformers goes by model_type, Megatron-Bridge by these.
    """
    for name in _names(config.get("architectures")):
        other = family_with(name)
        if other is not None and other is not family:
            return (
                f"architectures={name}: is a class of model_type {other.model_type}; programs differ in which they read"
            )
    own = config.get("auto_map")
    named = own.get("AutoModelForCausalLM") if isinstance(own, Mapping) else None
    if isinstance(named, str) and named.rpartition(".")[2] not in family.architectures:
        return (
            f"auto_map={escape_control(named)}: is a class of the model's own, which may compute something else and is "
            "not run here; take auto_map out if the model is transformers' own"
        )
    return None


def _names(value: object) -> list[str]:
    """The texts in a list of a file; none where it is no list."""
    if not isinstance(value, list | tuple):
        return []
    return [name for name in value if isinstance(name, str)]


def check_length(config: Mapping[str, Any], length: int) -> None:
    """Raise a UserError where sequences of `length` tokens are longer than a model with this config.json can have."""
    limit = position_limit_of(config)
    if limit is not None and length > limit:
        raise UserError(
            f"`trainer.seq_length={length}`: this model takes sequences up to {limit} tokens only; it has learned "
            "positions, or a rotary embedding that changes with the length of longer ones"
        )


def is_wide(width: int | None) -> bool:
    """Whether heads of `width` features are wider than WIDEST_PACKED_HEAD."""
    return width is not None and width > WIDEST_PACKED_HEAD


def check_wide_heads(width: int | None, context_parallel: int, dropout: float) -> None:
    """Raise a UserError where attention of wide heads would have to be Transformer Engine's.

    Args:
        width: features of a head.
        context_parallel: processes that a sequence is divided over.
        dropout: of the attention's probabilities.
    """
    if not is_wide(width):
        return
    heads = f"of packed rows whose heads have {width} features (more than {WIDEST_PACKED_HEAD})"
    if context_parallel > 1:
        raise UserError(
            f"`parallelism.context_parallel_size={context_parallel}`: gradients {heads} are wrong on GPUs when a "
            "sequence is divided over processes; use tensor or pipeline parallelism"
        )
    if dropout:
        raise UserError(f"model: gradients {heads} are wrong on GPUs with dropout in the attention; set it to 0")
