"""A Hugging Face PEFT directory of LoRA or DoRA weights, read from its JSON and its safetensors header.

The tensors' names and shapes say which modules are adapted and with what rank. Of adapter_config.json only the scale,
the kind and the base model are used, and every key of it has to be known: one that isn't might mean another adapter.
"""

import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from posttrain.errors import UserError
from posttrain.models.headers import Tensor, read_header, read_json, same_content
from posttrain.models.vocabulary import is_embedding, is_vocabulary

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
KINDS = {"lora_A.weight": "a", "lora_B.weight": "b", "lora_magnitude_vector": "magnitude"}
MODULE = re.compile(r"\w+(\.\w+)*")
# Keys of adapter_config.json that change nothing about the model that base and tensors make: how it was trained, which
# modules (the tensors say so), the settings of an initialisation (`init_lora_weights` says whether that matters).
HARMLESS = {
    "alpha_pattern",
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_alpha",
    "lora_dropout",
    "lora_ga_config",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "runtime_config",
    "target_modules",
    "task_type",
    "use_dora",
    "use_rslora",
}
# The others have to be off, in these words.
OFF: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "megatron_core": ("megatron.core",),
    "revision": ("main",),  # of the base, the one that is read
}
# Initialisations that leave the base's weights as they are; PEFT would change them again for each of the others.
KEEP_THE_BASE = (True, False, "gaussian", "eva", "orthogonal", "mica")
# What to do with an adapter that only PEFT knows.
BY_PEFT = (
    "LoRA, rsLoRA and DoRA of linear layers are; of what PEFT itself can merge it makes a whole model: "
    "AutoPeftModelForCausalLM.from_pretrained(DIR).merge_and_unload().save_pretrained(NEW_DIR)"
)
UNQUANTISED = ("F64", "F32", "F16", "BF16")  # in safetensors' words
SECONDS = 5.0  # for matching an adapter's patterns with its modules


@dataclass
class Pair:
    """The tensors of one adapted module; names in the file. A [rank, in], B [out, rank], magnitude [out] for DoRA.

    `scale` is what B A is multiplied by, computed from `alpha` and `rank`.
    """

    tensors: dict[str, str] = field(default_factory=dict)
    rank: int = 1
    alpha: float = 1.0
    scale: float = 1.0


type Adapter = tuple[dict[str, Any], dict[str, Pair], dict[str, Tensor]]


def is_adapter(directory: Path) -> bool:
    """Whether `directory` is a PEFT adapter."""
    return (directory / CONFIG).is_file()


def base_of(directory: Path) -> str:
    """The base model's directory or hub id, of the adapter's configuration."""
    base = read_json(directory / CONFIG).get("base_model_name_or_path")
    if not base or not isinstance(base, str):
        raise UserError(f"{directory / CONFIG}: base_model_name_or_path is empty; write the model's directory there")
    return base


def read_adapter(directory: Path) -> Adapter:
    """Return its configuration, module name -> Pair, and the tensors' headers.

    Raises:
        UserError: pickled or damaged weights, an adapter of another kind, or half of a pair.
    """
    config = read_json(directory / CONFIG)
    if not (directory / WEIGHTS).is_file():
        pickled = sorted(file.name for file in directory.glob("*.bin"))
        reason = "it is missing"
        if pickled:
            reason = f"{pickled[0]} is a pickle, which can run code; save it as safetensors"
        raise UserError(f"{directory / WEIGHTS}: {reason}")
    check_config(config, directory / CONFIG)
    tensors = read_header(directory / WEIGHTS)
    pairs: dict[str, Pair] = {}
    for name in tensors:
        if name.startswith(PREFIX) and is_vocabulary(base_name(name)):
            continue
        module, kind = _split(name)
        if not name.startswith(PREFIX) or not MODULE.fullmatch(module):
            raise UserError(f"{directory / WEIGHTS}: {name[:200]}: not supported; {BY_PEFT}")
        pairs.setdefault(module, Pair()).tensors[kind] = name
    if not pairs:
        raise UserError(f"{directory / WEIGHTS}: holds no tensor")
    required = {"a", "b"}
    if config.get("use_dora"):
        required.add("magnitude")
    ends = time.monotonic() + SECONDS
    for module, pair in pairs.items():
        missing = sorted(required - set(pair.tensors))
        if missing:
            raise UserError(f"{directory / WEIGHTS}: {module} lacks its {missing[0]}; the adapter is incomplete")
        shape = tensors[pair.tensors["a"]].shape
        if len(shape) != 2 or shape[0] < 1:
            raise UserError(f"{directory / WEIGHTS}: {module}: its lora_A has the shape {list(shape)}")
        pair.rank = shape[0]
        pair.alpha = find_alpha(config, module)
        divisor = math.sqrt(pair.rank) if config.get("use_rslora") else pair.rank
        pair.scale = pair.alpha / divisor
        if time.monotonic() > ends:
            raise UserError(f"{directory / CONFIG}: alpha_pattern: takes too long to match with the modules' names")
    return config, pairs, tensors


def base_name(name: str) -> str:
    """What the base calls a tensor that PEFT saves with an adapter; of a layer that is adapted it is a `base_layer`."""
    return name.removeprefix(PREFIX).replace(".base_layer.", ".")


def _split(name: str) -> tuple[str, str]:
    """(module, kind) of a tensor's name, see KINDS; empty where it has none."""
    for end, kind in KINDS.items():
        if name.endswith(f".{end}"):
            return name[len(PREFIX) : -len(end) - 1], kind
    return "", ""


def check_config(config: Mapping[str, Any], file: Path) -> None:
    """Raise a UserError unless adapter_config.json, from `file`, describes LoRA or DoRA that needs nothing else."""
    if config.get("peft_type") != "LORA":
        raise UserError(f"{file}: peft_type={str(config.get('peft_type'))[:80]}: not supported; {BY_PEFT}")
    if config.get("megatron_config") or config.get("megatron_core", "megatron.core") not in (None, "megatron.core"):
        raise UserError(f"{file}: megatron_core names a module that PEFT would import; refused")
    init = config.get("init_lora_weights", True)
    if init not in KEEP_THE_BASE:
        raise UserError(
            f"{file}: init_lora_weights={init!r}: PEFT changes the base model's weights for this initialisation each "
            "time that it loads the adapter; save it as plain LoRA first: save_pretrained(..., "
            "path_initial_model_for_weight_conversion=...) in PEFT"
        )
    if config.get("alora_invocation_tokens") is not None:
        raise UserError(
            f"{file}: alora_invocation_tokens: an activated LoRA, which acts only after these tokens, so no merged "
            "model is the same; not supported"
        )
    for key, value in config.items():
        if key not in HARMLESS and value not in (None, False, {}, [], *OFF.get(key, ())):
            raise UserError(f"{file}: {key[:80]}={str(value)[:80]}: not supported; {BY_PEFT}")
    for key in ("use_dora", "use_rslora"):
        if not isinstance(config.get(key, False), bool | None):
            raise UserError(f"{file}: {key}={str(config[key])[:80]}: must be true or false")
    rank = config.get("r", 8)
    if type(rank) is not int or rank < 1:
        raise UserError(f"{file}: r={str(rank)[:80]}: must be a number of at least 1")
    for key in ("alpha_pattern", "rank_pattern"):
        check_patterns(config.get(key) or {}, f"{file}: {key}")
    if not is_number(config.get("lora_alpha")):
        raise UserError(f"{file}: lora_alpha={str(config.get('lora_alpha'))[:80]}: must be a number")


def is_number(value: object) -> bool:
    """Whether a value of JSON is a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < 1e30 and not math.isnan(value)


def saved_vocabulary(directory: Path) -> dict[str, Tensor]:
    """The embedding and output matrix that PEFT saves with the adapter of a grown model, by the base's names."""
    if not (directory / WEIGHTS).is_file():
        return {}
    tensors = read_header(directory / WEIGHTS)
    return {base_name(name): tensor for name, tensor in tensors.items() if is_vocabulary(base_name(name))}


def check_patterns(patterns: object, name: str) -> None:
    """Raise a UserError unless `patterns` is a mapping of simple regular expressions to numbers.

    Anything that can take long to find that a name doesn't match is refused: groups that are repeated or looked ahead
    for, more than two repetitions, more alternatives than a name has.
    """
    if not isinstance(patterns, dict):
        raise UserError(f"{name}: must be a mapping")
    for pattern, value in patterns.items():
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise UserError(f"{name}: {pattern[:60]!r} is not a regular expression: {str(error)[:80]}") from None
        odd = re.search(r"\)[*+?{]|\(\?|\\\d", pattern)
        repetitions = len(re.findall(r"[*+?{]", pattern))
        too_many = repetitions > 2 or pattern.count("(") > 3 or pattern.count("|") > 12
        if len(pattern) > 200 or odd or too_many:
            raise UserError(f"{name}: {pattern[:60]!r}: too complicated to be a module's name")
        if not is_number(value):
            raise UserError(f"{name}: {pattern!r}: {str(value)[:80]!r} is not a number")


def find_alpha(config: Mapping[str, Any], module: str) -> float:
    """The alpha of a module, as PEFT finds it."""
    alpha: float = config["lora_alpha"]
    for pattern, own in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = own
            break
    return alpha


def _check_tied(name: str, tensors: Mapping[str, Tensor]) -> None:
    """Refuse an output matrix, saved for a base whose output is its embedding, that isn't the embedding saved with it.

    PEFT saves such a matrix twice; trained apart, one of them would be lost.
    """
    for other, tensor in tensors.items():
        if is_embedding(base_name(other)) and not same_content(tensor, tensors[name]):
            raise UserError(
                f"adapter: {name} differs from {other}, but in the base model they are one matrix "
                "(tie_word_embeddings), and one of them would be lost; give a base in which they are two"
            )


def check_against(base: Mapping[str, Tensor], pairs: Mapping[str, Pair], tensors: Mapping[str, Tensor]) -> None:
    """Raise a UserError unless every module is a matrix of the base model with the adapter's shape."""
    for module, pair in pairs.items():
        weight = base.get(f"{module}.weight")
        if weight is None:
            raise UserError(f"adapter: {module} is not in the base model; it was trained on another one")
        if weight.dtype not in UNQUANTISED:
            raise UserError(f"adapter: {module} of the base model is quantised ({weight.dtype}); give its full weights")
        a = tensors[pair.tensors["a"]].shape
        b = tensors[pair.tensors["b"]].shape
        if sorted(weight.shape) != sorted((b[0], a[1])) or a[0] != b[1]:
            raise UserError(
                f"adapter: {module} fits a matrix of {[b[0], a[1]]}, the base model's is {list(weight.shape)}; "
                "it was trained on another model"
            )
    for name, tensor in tensors.items():
        if not is_vocabulary(base_name(name)):
            continue
        weight = base.get(base_name(name))
        if weight is None and not is_embedding(name):
            _check_tied(name, tensors)
            continue
        if weight is None or len(tensor.shape) != 2 or tensor.shape[1:] != weight.shape[1:]:
            raise UserError(f"adapter: {name} of {list(tensor.shape)} is not the base model's; it has another width")
        if tensor.shape[0] < weight.shape[0]:
            raise UserError(f"adapter: {name} has {tensor.shape[0]} rows, fewer than the base's {weight.shape[0]}")
