"""Base weights + LoRA or DoRA = a whole model: safetensors in, safetensors out, no Megatron, one tensor at a time."""

import os
from collections.abc import Mapping
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open

from posttrain.checkpoint import directories
from posttrain.convert import card
from posttrain.convert.artifacts import add_stop_tokens, copy_generation_config, copy_tokenizer, write_config
from posttrain.convert.publish import check_apart, publishing
from posttrain.convert.shards import ShardWriter
from posttrain.errors import NoSuchModel, UserError
from posttrain.generate import load
from posttrain.generate.decoding import turn_ends
from posttrain.models import HFModel
from posttrain.models.families import family_of
from posttrain.models.families.family import ModelFamily
from posttrain.models.headers import Tensor, read_json
from posttrain.models.hf_adapter import CONFIG, UNQUANTISED, WEIGHTS, Pair, check_against, is_adapter, read_adapter
from posttrain.models.shapes import check_directory
from posttrain.models.vocabulary import is_output, is_vocabulary
from posttrain.utils import rundir, working

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def merge_adapter(
    path: Path,
    out: Path,
    overwrite: bool = False,
    dtype: str | None = None,
    license: str | None = None,
    base_path: str | None = None,
) -> Path:
    """Write the model that the adapter makes of its base, with the adapter's tokenizer where it has one.

    Args:
        path: a PEFT directory, or a run directory with one in it.
        out: the directory to write.
        overwrite: replace `out`.
        dtype: of the weights, float32 or bfloat16; None: the base's.
        license: of the weights, for the model card; None: what the adapter's card says.
        base_path: directory or hub id of the base; None: what the adapter's configuration names.

    Returns:
        The directory of the base.

    Raises:
        UserError: there is no adapter, no base, they do not belong together, or no merged model would be the same.
    """
    adapter = find_adapter(path)
    check_apart(out, adapter)
    _, pairs, tensors = read_adapter(adapter)
    adapted = HFModel(path=str(adapter))
    adapted.moved_base = base_path
    base = find_base(adapted)
    check_apart(out, base)
    headers = check_directory(base)
    hf_config = adapted.hf_config()
    family = family_of(hf_config.to_dict())
    transposed = family is not None and family.transposed
    check_unquantised(base, headers)
    check_output_apart(pairs, hf_config, family)
    check_against(headers, pairs, tensors)
    check_tokens(adapted, base, hf_config.vocab_size)
    first = next(iter(headers.values()))
    stored = {"F32": "float32", "F16": "float16"}.get(first.dtype, "bfloat16")
    with publishing(out, overwrite) as scratch:
        write_weights(scratch, headers, adapted, pairs, transposed, dtype)
        write_config(scratch, hf_config, base, dtype or stored)
        copy_generation_config(scratch, base)
        copy_generation_config(scratch, adapter)
        own = (adapter / "tokenizer_config.json").is_file()
        copy_tokenizer(scratch, adapter if own else base)
        if own:
            add_stop_tokens(scratch, turn_ends(HFModel(path=str(scratch)).load_tokenizer()), hf_config.eos_token_id)
        card.write_card(scratch, out.name, card.read_facts(adapter), license)
    return base


def find_adapter(path: Path) -> Path:
    """The PEFT directory that `path` is or, as a run directory, holds.

    Raises:
        UserError: there is none; with what would make one.
    """
    if is_adapter(path):
        return path
    rundir.check_tree(path, "adapter")
    if is_adapter(path / "adapter"):
        return path / "adapter"
    if not path.is_dir():
        raise UserError(f"checkpoint={path}: there is no such directory")
    load.refuse_sweep(path)
    for whole in (path, path / "hf"):
        if (whole / "config.json").is_file():
            raise UserError(f"checkpoint={path}: {whole} is a whole model already; there is nothing to merge")
    if directories.holds_checkpoints(path):
        raise UserError(
            f"checkpoint={path}: has checkpoints and no adapter/ yet; export one, and merge what that writes: "
            f"python -m posttrain.convert export {quote(str(path))} DIR"
        )
    raise UserError(f"checkpoint={path}: neither a PEFT directory ({CONFIG}) nor a run with an adapter/")


def find_base(adapted: HFModel) -> Path:
    """The directory of the base model, checked.

    Raises:
        UserError: it is not where the adapter's configuration says, nor where `convert.base` does.
    """
    try:
        return adapted.directory
    except NoSuchModel as error:
        raise UserError(
            f"{adapted.path}: its base model {adapted.base}: {error.reason}; say where it is with convert.base=DIR"
        ) from None


def check_unquantised(base: Path, headers: Mapping[str, Tensor]) -> None:
    """Refuse a base whose files hold numbers that aren't its weights: B A would be added to numbers without a scale.

    Raises:
        UserError: naming the method.
    """
    config = read_json(base / "config.json")
    for key in ("quantization_config", "compression_config"):
        if config.get(key):
            method = config[key].get("quant_method") if isinstance(config[key], dict) else config[key]
            raise UserError(
                f"{base / 'config.json'}: {key} ({method}): the base model is quantised; give its full weights with "
                "convert.base=DIR"
            )
    for name, tensor in headers.items():
        if "weight" in name.rpartition(".")[2] and tensor.dtype not in UNQUANTISED:
            raise UserError(
                f"{tensor.file}: {name} is quantised ({tensor.dtype}); give full weights with convert.base=DIR"
            )


def check_output_apart(pairs: Mapping[str, Pair], config: "PretrainedConfig", family: ModelFamily | None) -> None:
    """Refuse an adapter of an output layer that is the embedding too: merged, it would change what goes in as well.

    Raises:
        UserError: there is one.
    """
    tied = config.tie_word_embeddings
    if family is not None:
        tied = family.is_tied(config.to_dict())
    for module in pairs:
        if tied and is_output(f"{module}.weight"):
            raise UserError(
                f"adapter: {module} of the base model is its embedding too (tie_word_embeddings), so no merged model "
                "is the same; use the adapter as it is"
            )


def check_tokens(adapted: HFModel, base: Path, rows: int) -> None:
    """Refuse a tokenizer of the adapter with tokens that the embedding has no row for, and that the base's lacks.

    Raises:
        UserError: it has.
    """
    if not (Path(adapted.path) / "tokenizer_config.json").is_file():
        return
    count = largest_token(adapted) + 1
    if count > rows and count > largest_token(HFModel(path=str(base))) + 1:
        raise UserError(
            f"{adapted.path}: its tokenizer has a token {count - 1}, the embedding only {rows} rows, and the adapter "
            "brings no larger one; save the adapter with its embedding (save_embedding_layers=True in PEFT)"
        )


def largest_token(model: HFModel) -> int:
    """The largest id that a model's tokenizer can give."""
    return max(model.load_tokenizer().get_vocab().values())


def write_weights(
    scratch: Path,
    headers: dict[str, Tensor],
    adapted: HFModel,
    pairs: dict[str, Pair],
    transposed: bool,
    dtype: str | None,
) -> None:
    """Stream the base's tensors in the order of its files, merging where there is an adapter."""
    writer = ShardWriter(scratch)
    weights = Path(adapted.path) / WEIGHTS
    files: dict[Path, list[str]] = {}
    for name, tensor in headers.items():
        files.setdefault(tensor.file, []).append(name)
    total = sum(map(os.path.getsize, files))
    done = working.bytes_of("merging", total)
    with safe_open(weights, framework="pt") as adapter:
        for file, names in files.items():
            with safe_open(file, framework="pt") as base:
                for name in names:
                    weight = base.get_tensor(name)
                    done(weight.nbytes)
                    weight = adapted.vocabulary(name, weight)
                    to = weight.dtype
                    if dtype and weight.is_floating_point():
                        to = getattr(torch, dtype)
                    pair = pairs.get(name.removesuffix(".weight"))
                    if pair:
                        parts = {kind: adapter.get_tensor(own) for kind, own in pair.tensors.items()}
                        _check_finite(parts, pair, weights)
                        weight = merge_weight(weight, **parts, scale=pair.scale, transposed=transposed, dtype=to)
                    weight = weight.to(to)
                    if (pair or is_vocabulary(name)) and not weight.isfinite().all():
                        raise UserError(f"{weights}: merged, {name} holds numbers that are not finite in {to}")
                    writer.add(name, weight)
    writer.close()


def _check_finite(parts: dict[str, torch.Tensor], pair: Pair, file: Path) -> None:
    for kind, part in parts.items():
        if not part.isfinite().all():
            raise UserError(f"{file}: {pair.tensors[kind]} holds numbers that are not finite (NaN or infinite)")


def merge_weight(
    weight: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    scale: float,
    magnitude: torch.Tensor | None = None,
    transposed: bool = False,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """W + scale B A in fp32, then in `dtype` or that of W; for DoRA its rows at the trained magnitudes.

    Args:
        weight: W [out, in], or [in, out] where `transposed`.
        a, b: [rank, in] and [out, rank].
        magnitude: [out]; None: LoRA.
    """
    base = weight.T if transposed else weight
    whole = base.float() + scale * (b.float() @ a.float())
    if magnitude is not None:
        whole *= (magnitude.float().flatten() / torch.linalg.norm(whole, dim=1))[:, None]
    if transposed:
        whole = whole.T
    return whole.to(dtype or weight.dtype).contiguous()
