"""Megatron `torch_dist` checkpoints in and out, in one process on the CPU (see single_process.py)."""

import os
import shutil
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from megatron.bridge.training.checkpointing import (
    _generate_model_state_dict,
    apply_peft_adapter_filter_to_state_dict,
)
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.utils import unwrap_model
from torch.distributed.checkpoint.api import CheckpointException

from posttrain.checkpoint import directories, pickles
from posttrain.convert import mmap_weights
from posttrain.convert.artifacts import copy_generation_config, copy_tokenizer, write_config
from posttrain.convert.checkpoints import HUGGING_FACE, Checkpoint
from posttrain.convert.export import Source, export_source
from posttrain.convert.publish import publishing
from posttrain.convert.trained_tokenizer import TrainedTokenizer
from posttrain.errors import UserError
from posttrain.models import HFModel
from posttrain.models.headers import Tensor, read_headers
from posttrain.models.local_spec import check_expert_names, use_local_layers
from posttrain.utils import working

if TYPE_CHECKING:
    from megatron.bridge import AutoBridge
    from megatron.bridge.peft.base import PEFT

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
    _check_formats(model.directory, tensors)
    dtype = dtype or _usual_dtype(tensors)
    bridge = model.bridge()
    total = sum(map(os.path.getsize, {tensor.file for tensor in tensors.values()}))
    with publishing(out, overwrite) as scratch:
        count_reads(bridge, working.bytes_of("reading", total))
        parts = build(bridge, getattr(torch, dtype), scratch, load=True)
        working.phase("writing")
        unsealed = scratch / ".partial"
        with mmap_weights.save_without_copy():
            bridge.save_megatron_model(parts, unsealed)
        directories.publish(unsealed / "iter_0000000", scratch / "iter_0000000")
        shutil.rmtree(unsealed)
        beside = scratch / HUGGING_FACE
        beside.mkdir()
        write_config(beside, model.hf_config(), model.directory, dtype)
        copy_generation_config(beside, model.directory)
        copy_tokenizer(beside, Path(model.tokenizer_path))


def _check_formats(directory: Path, tensors: dict[str, Tensor]) -> None:
    unknown = {tensor.dtype for tensor in tensors.values()} - FORMATS.keys() - {"I64", "BOOL", "U8"}
    if unknown:
        raise UserError(f"{directory}: tensors of {', '.join(sorted(unknown))}; only unquantised models convert")


def _usual_dtype(tensors: dict[str, Tensor]) -> str:
    """bfloat16 where most numbers are, else float32."""
    every = bf16 = 0
    for tensor in tensors.values():
        every += prod(tensor.shape)
        if tensor.dtype == "BF16":
            bf16 += prod(tensor.shape)
    return "bfloat16" if 2 * bf16 > every else "float32"


def count_reads(bridge: "AutoBridge", done: Callable[[int], object]) -> None:
    """Report the bytes of every tensor that `bridge` reads from its directory."""
    source = bridge.hf_pretrained.state.source
    load = source.load_tensors

    def counted(keys: list[str]) -> dict[str, torch.Tensor]:
        tensors: dict[str, torch.Tensor] = load(keys)
        done(sum(tensor.nbytes for tensor in tensors.values()))
        return tensors

    source.load_tensors = counted


def build(
    bridge: "AutoBridge", dtype: torch.dtype, disk: Path, load: bool, adapter: "PEFT | None" = None
) -> list[torch.nn.Module]:
    """The Megatron model in one process, of local layers, its weights in a mapped file.

    Args:
        bridge: the model's AutoBridge.
        dtype: of the weights.
        disk: a directory where the disk has room for them.
        load: read the weights; else they are zeros.
        adapter: Megatron-Bridge's LoRA or DoRA to add, after the weights were read.
    """
    provider = bridge.to_megatron_provider(load_weights=load)
    use_local_layers(provider)
    check_expert_names(bridge, provider)
    provider.use_cpu_initialization = True
    provider.perform_initialization = False
    provider.params_dtype = provider.autocast_dtype = provider.pipeline_dtype = dtype
    provider.bf16 = dtype == torch.bfloat16
    provider.fp16 = False
    # What was allocated until then was never written to, and takes no memory.
    provider.register_pre_wrap_hook(lambda parts: mmap_weights.move_to_disk(parts, disk), prepend=True)
    if adapter is not None:
        provider.register_pre_wrap_hook(lambda parts: adapter(parts, training=True))
    provider.finalize()
    parts: list[torch.nn.Module] = provider.provide_distributed_model(wrap_with_ddp=False, use_cpu_initialization=True)
    return parts


def export_checkpoint(
    checkpoint: Checkpoint,
    out: Path,
    overwrite: bool = False,
    check: bool = True,
    dtype: str | None = None,
    license: str | None = None,
) -> None:
    """Write a checkpoint as a Hugging Face directory: the whole model, or the adapter of an adapter run.

    Args:
        checkpoint: the checkpoint.
        out: the directory to write.
        overwrite: replace `out`.
        check: compare logits.
        dtype: of a whole model's weights, float32 or bfloat16; None: the checkpoint's.
        license: of the weights, for the model card; None: what the run says.

    Raises:
        UserError: its tensors are not those of its model.
        ExportRefused: the result is not the model of the checkpoint.
    """
    adapter = checkpoint.peft.build() if checkpoint.peft else None
    trained = TrainedTokenizer(checkpoint.model, checkpoint.template)
    if checkpoint.template:
        checkpoint.model.grow(len(trained))
    out.parent.mkdir(parents=True, exist_ok=True)
    chosen = getattr(torch, dtype) if dtype else None
    parts, bridge, weights = load_checkpoint(checkpoint, adapter, out.parent, chosen)
    source = Source(
        model=checkpoint.model,
        bridge=bridge,
        parts=parts,
        peft=adapter,
        dtype=weights,
        device="cpu",
        unchecked=None if check else "convert.verify=false",
        tokenizer=trained,
        facts=checkpoint.facts,
        license=license,
    )
    total = 0
    for part in parts:
        total += sum(parameter.nbytes for parameter in part.parameters())
    export_source(source, out, overwrite, working.bytes_of("writing", total))


def load_checkpoint(
    checkpoint: Checkpoint, adapter: "PEFT | None", disk: Path, dtype: torch.dtype | None = None
) -> tuple[list[torch.nn.Module], "AutoBridge", torch.dtype]:
    """The model of a checkpoint (its base in fp32 where it holds an adapter), its bridge, its dtype; see `build`.

    Raises:
        UserError: a tensor is missing or has another shape: it is another model's, or half written.
    """
    where = str(checkpoint.directory)
    metadata = _read_metadata(checkpoint.directory)
    has_adapter = any(".adapter." in name for name in metadata)
    if has_adapter != bool(adapter):
        content = "an adapter" if has_adapter else "a whole model"
        raise UserError(f"{where}: holds {content}, its configuration says not")
    if dtype is None:
        dtype = torch.float32 if has_adapter else _stored_dtype(metadata)
    bridge = checkpoint.model.bridge()
    load_base = has_adapter and not checkpoint.model.random_init
    parts = build(bridge, dtype, disk, load=load_base, adapter=adapter)
    plain = unwrap_model(parts)
    sharded = _generate_model_state_dict(plain, {})
    if has_adapter:
        sharded = apply_peft_adapter_filter_to_state_dict(sharded, adapter)
    halves = mmap_weights.split_in_place(sharded["model"])
    try:
        with pickles.reading(checkpoint.directory):
            state = dist_checkpointing.load(sharded, where, strict=StrictHandling.RAISE_UNEXPECTED)
    except (
        CheckpointException,
        CheckpointingException,
        KeyError,
        ValueError,
        RuntimeError,
        OSError,
        EOFError,
    ) as error:
        raise UserError(f"{where}: not a checkpoint of {checkpoint.model.path}, or damaged: {_line(error)}") from error
    whole = {name: item for name, item in state["model"].items() if name not in halves}
    missing, _ = plain[0].load_state_dict(whole, strict=False)
    for name in missing:
        expected = ".adapter." in name or not has_adapter
        if expected and "_extra_state" not in name and name not in halves:
            raise UserError(f"{where}: {name} is missing; it is incomplete, or another model's")
    return parts, bridge, dtype


def _read_metadata(directory: Path) -> dict[str, Any]:
    """Tensor -> its shape and dtype, as Megatron describes it.

    Raises:
        UserError: it can't be read.
    """
    try:
        with pickles.reading(directory):
            metadata: dict[str, Any] = dist_checkpointing.load_tensors_metadata(str(directory))
    except (CheckpointingException, OSError, EOFError, ValueError) as error:
        raise UserError(f"{directory}: not a readable checkpoint ({_line(error)})") from error
    return metadata


def _stored_dtype(metadata: dict[str, Any]) -> torch.dtype:
    """bfloat16 where a weight is, else float32."""
    for name, tensor in metadata.items():
        if name.startswith(("embedding.", "decoder.", "model.")) and tensor.dtype == torch.bfloat16:
            return torch.bfloat16
    return torch.float32


def _line(error: BaseException) -> str:
    """What an error says, without the traceback that torch puts into its own."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1][:300]
