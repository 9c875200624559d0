"""A Hugging Face PEFT directory of LoRA or DoRA weights, read from its JSON and its safetensors header."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from posttrain.errors import UserError
from posttrain.models.headers import Tensor, read_header, read_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
KINDS = {"lora_A.weight": "a", "lora_B.weight": "b", "lora_magnitude_vector": "magnitude"}
TRANSPOSED = ("gpt2",)  # model types whose linear weights are [in, out]


@dataclass
class Pair:
    """The tensors of one adapted module; names in the file. A [rank, in], B [out, rank], magnitude [out] for DoRA."""

    tensors: dict[str, str] = field(default_factory=dict)
    scale: float = 1.0


def is_adapter(directory: Path) -> bool:
    """Whether `directory` is a PEFT adapter."""
    return (directory / CONFIG).is_file()


def base_of(directory: Path) -> str:
    """The base model's directory or hub id, of the adapter's configuration."""
    base = read_json(directory / CONFIG).get("base_model_name_or_path")
    if not base or not isinstance(base, str):
        raise UserError(f"{directory / CONFIG}: base_model_name_or_path is empty; write the model's directory there")
    return base


def read_adapter(directory: Path) -> tuple[dict[str, Any], dict[str, Pair], dict[str, Tensor]]:
    """Return its configuration, module name -> Pair, and the tensors' headers.

    Raises:
        UserError: pickled or damaged weights, an adapter of another kind, or half of a pair.
    """
    config = read_json(directory / CONFIG)
    if not (directory / WEIGHTS).is_file():
        pickled = sorted(file.name for file in directory.glob("*.bin"))
        reason = f"{pickled[0]} is a pickle, which can run code; save it as safetensors" if pickled else "it is missing"
        raise UserError(f"{directory / WEIGHTS}: {reason}")
    if config.get("peft_type") != "LORA":
        raise UserError(f"{directory / CONFIG}: peft_type {config.get('peft_type')}; only LoRA and DoRA are known")
    if config.get("modules_to_save") or config.get("bias", "none") != "none" or config.get("target_parameters"):
        raise UserError(f"{directory / CONFIG}: modules_to_save, bias and target_parameters are not supported")
    if config.get("megatron_config") or config.get("megatron_core", "megatron.core") not in (None, "megatron.core"):
        raise UserError(f"{directory / CONFIG}: megatron_core names a module that PEFT would import; refused")
    for name in ("alpha_pattern", "rank_pattern"):
        check_patterns(config.get(name) or {}, f"{directory / CONFIG}: {name}")
    if not isinstance(config.get("lora_alpha"), int | float):
        raise UserError(f"{directory / CONFIG}: lora_alpha={config.get('lora_alpha')!r}: must be a number")
    tensors = read_header(directory / WEIGHTS)
    pairs: dict[str, Pair] = {}
    for name in tensors:
        end = next((end for end in KINDS if name.endswith(f".{end}")), None)
        if end is None or not name.startswith(PREFIX):
            raise UserError(f"{directory / WEIGHTS}: {name} is not a weight of LoRA or DoRA on a linear layer")
        pairs.setdefault(name[len(PREFIX) : -len(end) - 1], Pair()).tensors[KINDS[end]] = name
    wanted = {"a", "b", "magnitude"} if config.get("use_dora") else {"a", "b"}
    for module, pair in pairs.items():
        if missing := sorted(wanted - set(pair.tensors)):
            raise UserError(f"{directory / WEIGHTS}: {module} lacks its {missing[0]}; the adapter is incomplete")
        shape = tensors[pair.tensors["a"]].shape
        if len(shape) != 2 or shape[0] < 1:
            raise UserError(f"{directory / WEIGHTS}: {module}: its lora_A has the shape {list(shape)}")
        pair.scale = scale(config, module, shape[0])
    return config, pairs, tensors


def check_patterns(patterns: Any, name: str) -> None:
    """Raise a UserError unless `patterns` is a mapping of simple regular expressions to numbers.

    Repeated groups are refused: they can take longer than the universe's age to find that a name doesn't match.
    """
    if not isinstance(patterns, dict):
        raise UserError(f"{name}: must be a mapping")
    for pattern, value in patterns.items():
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(f"{name}: {pattern!r} is not a regular expression: {error}") from None
        if len(pattern) > 200 or re.search(r"\)[*+?{]", pattern) or len(re.findall(r"[*+{]", pattern)) > 4:
            raise UserError(f"{name}: {pattern[:60]!r}: too complicated to be a module's name")
        if not isinstance(value, int | float):
            raise UserError(f"{name}: {pattern!r}: {value!r} is no number")


def scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    """What B A is multiplied by, as PEFT reckons it."""
    patterns = config.get("alpha_pattern") or {}
    alpha = next((a for key, a in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), config["lora_alpha"])
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def check_against(base: Mapping[str, Tensor], pairs: Mapping[str, Pair], tensors: Mapping[str, Tensor]) -> None:
    """Raise a UserError unless every module is a matrix of the base model with the adapter's shape."""
    for module, pair in pairs.items():
        weight = base.get(f"{module}.weight")
        if weight is None:
            raise UserError(f"adapter: {module} is not in the base model; it was trained on another one")
        a, b = (tensors[pair.tensors[key]].shape for key in "ab")
        if sorted(weight.shape) != sorted((b[0], a[1])) or a[0] != b[1]:
            raise UserError(
                f"adapter: {module} fits a matrix of {[b[0], a[1]]}, the base model's is {list(weight.shape)}; "
                "it was trained on another model"
            )
