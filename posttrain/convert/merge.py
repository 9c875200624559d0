"""Base weights + LoRA or DoRA = a whole model: safetensors in, safetensors out, no Megatron, one tensor at a time."""

import os
from pathlib import Path

import torch
from safetensors import safe_open

from posttrain.convert import card
from posttrain.convert.artifacts import add_stop_tokens, copy_generation_config, copy_tokenizer, write_config
from posttrain.convert.progress_bar import show_progress
from posttrain.convert.publish import publishing
from posttrain.convert.shards import ShardWriter
from posttrain.errors import UserError
from posttrain.generate.decoding import turn_ends
from posttrain.models import HFModel
from posttrain.models.families import family_of
from posttrain.models.headers import Tensor
from posttrain.models.hf_adapter import CONFIG, WEIGHTS, Pair, base_of, check_against, is_adapter, read_adapter
from posttrain.models.shapes import check_directory
from posttrain.utils import rundir


def merge_adapter(
    path: Path, out: Path, overwrite: bool = False, dtype: str | None = None, license: str | None = None
) -> None:
    """Write the model that the adapter makes of its base, with the adapter's tokenizer where it has one.

    Args:
        path: a PEFT directory, or a run directory with one in it.
        out: the directory to write.
        overwrite: replace `out`.
        dtype: of the weights, float32 or bfloat16; None: the base's.
        license: of the weights, for the model card; None: what the adapter's card says.

    Raises:
        UserError: there is no adapter, no base, or they do not belong together.
    """
    adapter = find_adapter(path)
    _, pairs, tensors = read_adapter(adapter)
    model = HFModel(path=base_of(adapter))
    base = model.directory
    adapted = HFModel(path=str(adapter))
    headers = check_directory(base)
    check_against(headers, pairs, tensors)
    hf_config = adapted.hf_config()
    family = family_of(hf_config.to_dict())
    transposed = family is not None and family.transposed
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


def find_adapter(path: Path) -> Path:
    """The PEFT directory that `path` is or, as a run directory, holds."""
    if is_adapter(path):
        return path
    rundir.check_tree(path, "adapter")
    if is_adapter(path / "adapter"):
        return path / "adapter"
    raise UserError(
        f"checkpoint={path}: neither a PEFT directory ({CONFIG}) nor a run with an adapter/; "
        "export a checkpoint first: python -m posttrain.convert export"
    )


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
    with show_progress("merging", total) as done, safe_open(weights, framework="pt") as adapter:
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
                    writer.add(name, weight.to(to))
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
