"""Megatron `torch_dist` checkpoints in and out, in one process on the CPU (see process.py)."""

import shutil
from math import prod
from pathlib import Path
from typing import Any

import torch

from posttrain.checkpoint import directories, pickles
from posttrain.convert import mmap_weights
from posttrain.convert.artifacts import copy_generation_config, copy_tokenizer, write_config
from posttrain.convert.checkpoints import HUGGING_FACE, Checkpoint
from posttrain.convert.export import Source, export
from posttrain.convert.progress_bar import progress
from posttrain.convert.publish import publishing
from posttrain.convert.trained_tokenizer import TrainedTokenizer
from posttrain.errors import UserError
from posttrain.models import HFModel
from posttrain.models.headers import read_headers

FORMATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def import_model(model: HFModel, out: Path, overwrite: bool = False, dtype: str | None = None) -> None:
    """Write the Hugging Face model as a Megatron checkpoint.

    Args:
        model: its directory is read.
        out: the directory to write.
        overwrite: replace `out`.
        dtype: of the weights, float32 or bfloat16; None: bfloat16 where most of them are, else float32.

    Raises:
        UserError: the directory is damaged, or its architecture is not known.
    """
    tensors = read_headers(model.directory)
    dtypes = {tensor.dtype for tensor in tensors.values()}
    if unknown := dtypes - FORMATS.keys() - {"I64", "BOOL", "U8"}:
        raise UserError(f"{model.directory}: tensors of {', '.join(sorted(unknown))}; only unquantised models convert")
    bf16 = sum(prod(t.shape) for t in tensors.values() if t.dtype == "BF16")
    mostly = "bfloat16" if 2 * bf16 > sum(prod(t.shape) for t in tensors.values()) else "float32"
    weights = getattr(torch, dtype or mostly)
    bridge = model.bridge()
    total = sum(file.stat().st_size for file in {tensor.file for tensor in tensors.values()})
    with publishing(out, overwrite) as scratch:
        with progress("reading", total) as done:
            count_reads(bridge, done)
            parts = build(bridge, weights, scratch, load=True)
        unsealed = scratch / ".partial"
        with mmap_weights.saved_as_they_lie():
            bridge.save_megatron_model(parts, unsealed)
        directories.publish(unsealed / "iter_0000000", scratch / "iter_0000000")
        shutil.rmtree(unsealed)
        beside = scratch / HUGGING_FACE
        beside.mkdir()
        write_config(beside, model.hf_config(), model.directory, dtype or mostly)
        copy_generation_config(beside, model.directory)
        copy_tokenizer(beside, Path(model.tokenizer_path))


def count_reads(bridge: Any, done: Any) -> None:
    """Report the bytes of every tensor that `bridge` reads from its directory."""
    source = bridge.hf_pretrained.state.source
    load = source.load_tensors

    def counted(keys):
        found = load(keys)
        done(sum(tensor.numel() * tensor.element_size() for tensor in found.values()))
        return found

    source.load_tensors = counted


def build(bridge: Any, dtype: torch.dtype, disk: Path, load: bool, adapter: Any = None) -> list[torch.nn.Module]:
    """The Megatron model in one process, of local layers, its weights in a mapped file.

    Args:
        bridge: the model's AutoBridge.
        dtype: of the weights.
        disk: a directory where the disk has room for them.
        load: read the weights; else they are zeros.
        adapter: Megatron-Bridge's LoRA or DoRA to add, after the weights were read.
    """
    from posttrain.models.local_spec import use_local_layers

    provider = bridge.to_megatron_provider(load_weights=load)
    use_local_layers(provider)
    provider.use_cpu_initialization = True
    provider.perform_initialization = False
    provider.params_dtype = provider.autocast_dtype = provider.pipeline_dtype = dtype
    provider.bf16, provider.fp16 = dtype == torch.bfloat16, False
    # What was allocated until then was never written to, and takes no memory.
    provider.register_pre_wrap_hook(lambda parts: mmap_weights.move(parts, disk), prepend=True)
    if adapter is not None:
        provider.register_pre_wrap_hook(lambda parts: adapter(parts, training=True))
    provider.finalize()
    return provider.provide_distributed_model(wrap_with_ddp=False, use_cpu_initialization=True)


def export_checkpoint(
    found: Checkpoint, out: Path, overwrite: bool = False, check: bool = True, dtype: str | None = None,
    license: str | None = None,
) -> None:  # fmt: skip
    """Write a checkpoint as a Hugging Face directory: the whole model, or the adapter of an adapter run.

    Args:
        found: the checkpoint.
        out: the directory to write.
        overwrite: replace `out`.
        check: compare logits.
        dtype: of a whole model's weights, float32 or bfloat16; None: the checkpoint's.
        license: of the weights, for the model card; None: what the run says.

    Raises:
        UserError: its tensors are not those of its model.
        ExportRefused: the result is not the model of the checkpoint.
    """
    adapter = found.peft.build() if found.peft else None
    trained = TrainedTokenizer(found.model, found.template)
    if found.template:
        found.model.grow(len(trained))
    out.parent.mkdir(parents=True, exist_ok=True)
    parts, bridge, weights = load(found, adapter, out.parent, getattr(torch, dtype) if dtype else None)
    source = Source(
        found.model, bridge, parts, adapter, weights, "cpu", None if check else "convert.verify=false",
        trained, found.facts, license,
    )  # fmt: skip
    total = sum(p.numel() * p.element_size() for part in parts for p in part.parameters())
    with progress("writing", total) as done:
        export(source, out, overwrite, done)


def load(
    found: Checkpoint, adapter: Any, disk: Path, dtype: torch.dtype | None = None
) -> tuple[list[torch.nn.Module], Any, torch.dtype]:
    """The model of a checkpoint (its base in fp32 where it holds an adapter), its bridge, its dtype; see `build`.

    Raises:
        UserError: a tensor is missing or has another shape: it is another model's, or half written.
    """
    from megatron.bridge.training.checkpointing import (
        _generate_model_state_dict,
        apply_peft_adapter_filter_to_state_dict,
    )
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.core import CheckpointingException
    from megatron.core.dist_checkpointing.validation import StrictHandling
    from megatron.core.utils import unwrap_model
    from torch.distributed.checkpoint.api import CheckpointException

    where = str(found.directory)
    try:
        with pickles.reading(found.directory):
            held = dist_checkpointing.load_tensors_metadata(where)
    except (CheckpointingException, OSError, EOFError, ValueError) as error:
        raise UserError(f"{where}: not a readable checkpoint ({_line(error)})") from error
    has_adapter = any(".adapter." in name for name in held)
    if has_adapter != bool(adapter):
        raise UserError(
            f"{where}: holds {'an adapter' if has_adapter else 'a whole model'}, its configuration says not"
        )
    weights = [t.dtype for name, t in held.items() if name.startswith(("embedding.", "decoder.", "model."))]
    dtype = dtype or (torch.float32 if has_adapter or torch.bfloat16 not in weights else torch.bfloat16)
    bridge = found.model.bridge()
    parts = build(bridge, dtype, disk, load=has_adapter and not found.model.random_init, adapter=adapter)
    plain = unwrap_model(parts)
    wanted = _generate_model_state_dict(plain, {})
    if has_adapter:
        wanted = apply_peft_adapter_filter_to_state_dict(wanted, adapter)
    halves = mmap_weights.in_place(wanted["model"])
    try:
        with pickles.reading(found.directory):
            state = dist_checkpointing.load(wanted, where, strict=StrictHandling.RAISE_UNEXPECTED)
    except (
        CheckpointException,
        CheckpointingException,
        KeyError,
        ValueError,
        RuntimeError,
        OSError,
        EOFError,
    ) as error:
        raise UserError(f"{where}: not a checkpoint of {found.model.path}, or damaged: {_line(error)}") from error
    whole = {name: item for name, item in state["model"].items() if name not in halves}
    missing, _ = plain[0].load_state_dict(whole, strict=False)
    lost = [name for name in missing if "_extra_state" not in name and (".adapter." in name or not has_adapter)]
    if lost := [name for name in lost if name not in halves]:
        raise UserError(f"{where}: {lost[0]} is missing; it is incomplete, or another model's")
    return parts, bridge, dtype


def _line(error: BaseException) -> str:
    """What an error says, without the traceback that torch puts into its own."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1][:300]
