"""What lies beside the weights in a Hugging Face directory: config, generation config, tokenizer, chat template."""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.errors import UserError
from posttrain.models.families import family_of
from posttrain.models.headers import own_file, read_json, read_optional_json
from posttrain.models.tokenizer_files import FILES

if TYPE_CHECKING:
    from transformers import PretrainedConfig

GENERATION = "generation_config.json"


def write_config(out: Path, config: "PretrainedConfig", base: Path | None, dtype: str) -> None:
    """Write config.json as the base has it, in words that transformers 4 and 5 both read.

    transformers 5 knows `rope_parameters` and `dtype`, transformers 4 `rope_theta`, `rope_scaling` and `torch_dtype`
    (without `rope_theta` it takes 10000 and says nothing).

    Args:
        config: the transformers configuration.
        base: directory whose config.json is kept word by word; None: what `config` says.
        dtype: of the weights written: float32, bfloat16.
    """
    fields: dict[str, Any] = config.to_dict()
    if base:
        fields = read_json(base / "config.json")
    fields |= {"dtype": dtype, "torch_dtype": dtype, "vocab_size": config.vocab_size}
    rope = getattr(config, "rope_parameters", None)
    if rope and "rope_theta" in rope:
        fields["rope_parameters"] = dict(rope)
        fields["rope_theta"] = rope["rope_theta"]
        fields["rope_scaling"] = None
        if rope.get("rope_type", "default") != "default":
            others = ("rope_theta", "partial_rotary_factor")
            fields["rope_scaling"] = {key: value for key, value in rope.items() if key not in others}
    family = family_of(config.to_dict())
    if family is not None:
        fields |= family.legacy_fields(config)
    _write(out / "config.json", fields)


def _write(file: Path, fields: dict[str, Any]) -> None:
    file.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def copy_tokenizer(out: Path, source: Path) -> None:
    """Copy a tokenizer's files and no others, as they are, but for the name of a class that transformers 4 lacks.

    Raises:
        UserError: one of them is no file of that folder.
    """
    for name in FILES:
        if own_file(source / name):
            shutil.copyfile(source / name, out / name)
    config = out / "tokenizer_config.json"
    fields = read_optional_json(config)
    if fields.get("tokenizer_class") == "TokenizersBackend":  # transformers 5 takes the older name for it too
        fields["tokenizer_class"] = "PreTrainedTokenizerFast"
        _write(config, fields)


def copy_generation_config(out: Path, source: Path) -> None:
    """Copy generation_config.json where there is one."""
    if own_file(source / GENERATION):
        shutil.copyfile(source / GENERATION, out / GENERATION)


def write_chat_template(out: Path, text: str) -> None:
    """Make `text` the chat template of the tokenizer in `out`, where it isn't already.

    transformers 5 reads chat_template.jinja, older ones and other tools tokenizer_config.json.
    """
    file = out / "chat_template.jinja"
    config = out / "tokenizer_config.json"
    fields = read_optional_json(config)
    before = fields.get("chat_template")
    if file.is_file():
        before = file.read_text(encoding="utf-8")
    if before == text:
        return
    file.write_text(text, encoding="utf-8")
    fields["chat_template"] = text
    _write(config, fields)


def set_end_token(out: Path, token: str) -> None:
    """Make `token` the end token of the tokenizer in `out`, in the words of transformers 5 and 4."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        file = out / name
        if not file.is_file():
            continue
        fields = read_json(file)
        if name == "tokenizer_config.json" or "eos_token" in fields:
            fields["eos_token"] = token
            _write(file, fields)


def add_stop_tokens(out: Path, ids: set[int], known: int | list[int] | None) -> None:
    """Put into generation_config.json the tokens that end a turn: a base model's own end token may be another.

    Args:
        ids: that end a turn of the chat template.
        known: the end tokens of config.json, which count where generation_config.json has none.
    """
    file = out / GENERATION
    fields = read_optional_json(file)
    present = as_set(fields.get("eos_token_id", known), file)
    if not ids <= present:
        fields["eos_token_id"] = sorted(present | ids)
        _write(file, fields)


def as_set(ids: int | list[int] | None, file: Path) -> set[int]:
    """The end tokens of a configuration, which says one, several or none.

    Args:
        ids: as JSON has them.
        file: where, for the error.

    Raises:
        UserError: they are something else.
    """
    listed = [token for token in (ids if isinstance(ids, list) else [ids]) if token is not None]
    if not all(type(token) is int for token in listed):
        raise UserError(f"{file}: eos_token_id={str(ids)[:80]}: must be a token's number, or a list of them")
    return set(listed)
