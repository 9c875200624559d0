"""Whether a model's tensors have the shapes that its config.json promises; cheap enough to run before every start."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from posttrain.errors import UserError
from posttrain.models.config_checks import check_config
from posttrain.models.families import family_of
from posttrain.models.families.family import Flag, ModelFamily, is_set
from posttrain.models.headers import Tensor, read_headers, read_json, same_content
from posttrain.models.vocabulary import is_embedding, is_output

log = logging.getLogger(__name__)
FLOATING = ("F64", "F32", "F16", "BF16")  # dtypes of weights, in the format's words


def check_directory(directory: Path) -> dict[str, Tensor]:
    """Return the tensors of a Hugging Face model directory, once they agree with each other and with its config.json.

    Of a family that isn't known only the files themselves are checked, and the log says so.

    Raises:
        UserError: see `read_headers`; or a tensor's shape, the number of layers, or the tensors of a layer contradict
            config.json.
    """
    config = read_json(directory / "config.json")
    check_config(config, f"{directory / 'config.json'}: ")
    tensors = read_headers(directory)
    family = family_of(config)
    if family is None:
        log.warning(
            "%s: model_type %r is not known here, so its tensors' shapes are not compared with config.json",
            directory,
            config.get("model_type"),
        )
        check_output(directory, None, config, tensors)
        return tensors
    try:
        sizes = family.dimensions(config)
    except ValueError as error:
        raise UserError(
            f"{directory / 'config.json'}: a size is missing or wrong ({error}); is it a language model?"
        ) from error
    for name, tensor in tensors.items():
        expected = family.shape_of(name, sizes)
        if expected is not None and tensor.shape != expected:
            raise UserError(
                f"{tensor.file}: {name} has shape {list(tensor.shape)}, but config.json says {list(expected)}; "
                "the weights and config.json belong to different models"
            )
        if expected is not None and tensor.dtype not in FLOATING:
            raise UserError(
                f"{tensor.file}: {name} is stored as {tensor.dtype}; give the model whose weights are not quantised"
            )
    check_layers(directory, family, tensors, sizes.layers)
    check_biases(directory, family, config, tensors)
    check_output(directory, family, config, tensors)
    return tensors


def check_output(
    directory: Path, family: ModelFamily | None, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Raise a UserError where the weights and config.json disagree about the output matrix.

    A copy of the embedding, which some programs save for a tied model, is none of its own.
    """
    tied = config.get("tie_word_embeddings")
    if family is not None:
        tied = family.is_tied(config)
    embedding = next((name for name in tensors if is_embedding(name)), None)
    output = next((name for name in tensors if is_output(name)), None)
    if embedding is None or tied is None:
        return
    if tied and output and not same_content(tensors[embedding], tensors[output]):
        raise UserError(
            f"{tensors[output].file}: {output} differs from {embedding}, but by config.json they are one matrix "
            "(tie_word_embeddings is true), and one of them would be lost; set tie_word_embeddings to false in "
            f"config.json, or take {output} out of the file"
        )
    if family is None or tied:
        return
    if not output:
        raise UserError(
            f"{directory}: the weights have no output matrix (lm_head), but config.json says that it is not the "
            "embedding; if it is, set tie_word_embeddings to true there"
        )


def check_biases(
    directory: Path, family: ModelFamily, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Raise a UserError where a matrix of the files has a bias and config.json says that it has none, or the reverse.

    transformers would leave it out, or make it up.
    """
    for name in tensors:
        matrix = family.matrix_of(name)
        if matrix is None or matrix.component is None:
            continue
        bias = f"{name.removesuffix('weight')}bias"
        if is_set(matrix.bias, config) and bias not in tensors:
            raise UserError(f"{directory}: {bias} is missing; the weights are incomplete")
        if bias in tensors and not is_set(matrix.bias, config):
            hint = "take the biases out of the files"
            if isinstance(matrix.bias, Flag):
                hint = f"set {matrix.bias.field} to true in config.json, or {hint}"
            raise UserError(f"{tensors[bias].file}: {bias} would be lost: by config.json the layer has no bias; {hint}")


def check_layers(directory: Path, family: ModelFamily, tensors: Mapping[str, Tensor], count: int) -> None:
    """Raise a UserError unless there are `count` layers and each holds what the first holds."""
    layers: dict[int, set[str]] = {}
    for name in tensors:
        place = family.layer_of(name)
        if place is not None and not family.is_buffer(name):
            number, inside = place
            layers.setdefault(number, set()).add(inside)
    if len(layers) != count or set(layers) != set(range(len(layers))):
        raise UserError(f"{directory}: the weights have {len(layers)} layers, config.json says {count}")
    for number, names in sorted(layers.items()):
        if names != layers[0]:
            name = min(names ^ layers[0])
            holder, other = 0, number
            if name in names:
                holder, other = number, 0
            raise UserError(
                f"{directory}: layer {holder} has {name}, layer {other} has not; the weights are incomplete"
            )
