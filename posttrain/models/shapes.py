"""Whether a model's tensors have the shapes that its config.json promises; cheap enough to run before every start."""

import re
from collections.abc import Mapping
from pathlib import Path

from posttrain.errors import UserError
from posttrain.models.headers import Tensor, read_headers, read_json, same_content
from posttrain.models.vocabulary import is_embedding, is_output

# Model types that are tied, or not, where config.json doesn't say; others are not judged.
TIED = {"gemma": True, "gemma2": True, "gpt2": True}
TIED |= dict.fromkeys(("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gpt_neox"), False)
LAYER = re.compile(r"^(.*?\b(?:layers|h))\.(\d+)\.(.+)$")
# Buffers that some published checkpoints hold in some of their layers; not weights.
BUFFERS = ("rotary_emb.inv_freq", "attn.bias", "attn.masked_bias", "attention.bias", "attention.masked_bias")


def is_buffer(name: str) -> bool:
    """Whether a tensor of this name is one of BUFFERS."""
    return f".{name}".endswith(tuple(f".{buffer}" for buffer in BUFFERS))


def dimensions(config: Mapping) -> dict[str, int]:
    """Return H hidden, I MLP, E expert MLP, A query and K key/value features, V vocabulary, P positions, L layers.

    Args:
        config: fields of a config.json, in the words of any supported family.
    """

    def first(*names: str, default=None):
        return next((config[name] for name in names if config.get(name) is not None), default)

    hidden, heads = first("hidden_size", "n_embd"), first("num_attention_heads", "n_head")
    width = first("head_dim", default=hidden // heads)
    inner = first("intermediate_size", "n_inner", default=4 * hidden)
    return {
        "H": hidden,
        "I": inner,
        "E": first("moe_intermediate_size", default=inner),
        "A": heads * width,
        "K": first("num_key_value_heads", default=heads) * width,
        "V": config["vocab_size"],
        "P": first("n_positions", "max_position_embeddings"),
        "L": first("num_hidden_layers", "n_layer"),
        "3H": 3 * hidden,
    }


# End of a tensor's name -> its shape in the letters of `dimensions`.
SHAPES = {
    "embed_tokens.weight": ("V", "H"),
    "lm_head.weight": ("V", "H"),
    "self_attn.q_proj.weight": ("A", "H"),
    "self_attn.k_proj.weight": ("K", "H"),
    "self_attn.v_proj.weight": ("K", "H"),
    "self_attn.o_proj.weight": ("H", "A"),
    "mlp.gate_proj.weight": ("I", "H"),
    "mlp.up_proj.weight": ("I", "H"),
    "mlp.down_proj.weight": ("H", "I"),
    # experts of Mixtral and of Qwen3-MoE
    "w1.weight": ("I", "H"),
    "w2.weight": ("H", "I"),
    "w3.weight": ("I", "H"),
    "experts.*.gate_proj.weight": ("E", "H"),
    "experts.*.up_proj.weight": ("E", "H"),
    "experts.*.down_proj.weight": ("H", "E"),
    # GPT-2, whose linear weights are transposed
    "wte.weight": ("V", "H"),
    "wpe.weight": ("P", "H"),
    "attn.c_attn.weight": ("H", "3H"),
    "h.*.mlp.c_fc.weight": ("H", "I"),
    "h.*.mlp.c_proj.weight": ("I", "H"),
    # GPT-NeoX
    "embed_in.weight": ("V", "H"),
    "embed_out.weight": ("V", "H"),
    "attention.query_key_value.weight": ("3H", "H"),
    "mlp.dense_h_to_4h.weight": ("I", "H"),
    "mlp.dense_4h_to_h.weight": ("H", "I"),
}
RULES = [(re.compile(r"(^|\.)" + re.escape(end).replace(r"\*", r"\d+") + "$"), shape) for end, shape in SHAPES.items()]


def check_directory(directory: Path) -> dict[str, Tensor]:
    """Return the tensors of a Hugging Face model directory, once they agree with each other and with its config.json.

    Raises:
        UserError: see `read_headers`; or a tensor's shape, the number of layers, or the tensors of a layer contradict
            config.json.
    """
    config = read_json(directory / "config.json")
    tensors = read_headers(directory)
    try:
        sizes = dimensions(config)
        if odd := next((v for v in sizes.values() if v is not None and (type(v) is not int or v < 1)), None):
            raise TypeError(f"{odd!r} is no size")
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(
            f"{directory / 'config.json'}: a size is missing or wrong ({error}); is it a language model?"
        ) from error
    for name, tensor in tensors.items():
        for pattern, letters in RULES:
            expected = tuple(sizes[letter] for letter in letters)
            if pattern.search(name) and tensor.shape != expected:
                raise UserError(
                    f"{tensor.file}: {name} has shape {list(tensor.shape)}, but config.json says {list(expected)}; "
                    "the weights and config.json belong to different models"
                )
    check_layers(directory, tensors, sizes["L"])
    check_output(directory, config, tensors)
    return tensors


def check_output(directory: Path, config: Mapping, tensors: Mapping[str, Tensor]) -> None:
    """Raise a UserError where the weights and config.json disagree about the output matrix.

    A copy of the embedding, which some programs save for a tied model, is none of its own.
    """
    model_type = config.get("model_type")
    tied = config.get("tie_word_embeddings", TIED.get(model_type))
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
    if not tied and output and TIED.get(model_type):
        raise UserError(
            f"{directory}: a {model_type} with an output matrix of its own (tie_word_embeddings is false) is not "
            "supported: the layers here take the embedding for it"
        )
    if not tied and not output and model_type in TIED:
        raise UserError(
            f"{directory}: the weights have no output matrix (lm_head), but config.json says that it is not the "
            "embedding; if it is, set tie_word_embeddings to true there"
        )


def check_layers(directory: Path, tensors: Mapping[str, Tensor], count: int) -> None:
    """Raise a UserError unless there are `count` layers and each holds what the first holds."""
    layers: dict[int, set[str]] = {}
    for name in tensors:
        if (match := LAYER.match(name)) and not is_buffer(name):
            layers.setdefault(int(match[2]), set()).add(match[3])
    if len(layers) != count or set(layers) != set(range(len(layers))):
        raise UserError(f"{directory}: the weights have {len(layers)} layers, config.json says {count}")
    for number, names in sorted(layers.items()):
        if names != layers[0]:
            name = sorted(names ^ layers[0])[0]
            holder, other = (number, 0) if name in names else (0, number)
            raise UserError(
                f"{directory}: layer {holder} has {name}, layer {other} has not; the weights are incomplete"
            )
