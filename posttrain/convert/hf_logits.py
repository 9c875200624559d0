"""What transformers (and PEFT) make of a directory, in fp32 or bf16 arithmetic, from mapped weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path

import psutil
import torch
from torch.utils.hooks import RemovableHandle

from posttrain.errors import ExportRefused
from posttrain.models import HFModel
from posttrain.models.headers import read_headers
from posttrain.peft.attach import attach_adapter


def too_large(model: HFModel, directory: Path, device: str) -> str | None:
    """Why transformers can't hold the model beside the live one; None where it can.

    On the CPU its weights are the mapped files, but for experts, which transformers joins.
    """
    source = directory if (directory / "config.json").is_file() else model.directory
    size = 0
    for name, tensor in read_headers(source).items():
        if device == "cuda" or ".experts." in name:
            size += prod(tensor.shape) * (4 if tensor.dtype == "F32" else 2)
    needed = 1.2 * size
    if device == "cuda":
        free, _ = torch.cuda.mem_get_info()
    else:
        free = psutil.virtual_memory().available
    if needed <= free:
        return None
    return f"transformers needs {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB of {device} memory are free"


@torch.no_grad()
def reference_logits(
    directory: Path, model: HFModel, adapter: bool, tokens: list[torch.Tensor], bf16: bool, device: str
) -> tuple[list[torch.Tensor], list[torch.Tensor] | None]:
    """Logits of the written directory: in fp32 arithmetic, and with `bf16` in bf16 too.

    Args:
        directory: a Hugging Face model, or an adapter.
        model: that it is of.
        adapter: whether it is an adapter.
        tokens: prompts, each int64[n, length].
        bf16: whether bf16 is asked for.
        device: "cpu" or "cuda".

    Raises:
        ExportRefused: transformers finds a tensor missing, or one too many.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    source = model.directory if adapter else directory
    # As stored, so that the weights stay in the mapped files.
    stored = {tensor.dtype for tensor in read_headers(source).values()}
    dtype = torch.float32
    if stored == {"BF16"}:
        dtype = torch.bfloat16
    elif stored == {"F16"}:
        dtype = torch.float16
    hf, loading_info = AutoModelForCausalLM.from_pretrained(
        source,
        dtype=dtype,
        attn_implementation="eager",
        trust_remote_code=model.trust_remote_code,
        output_loading_info=True,
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = sorted(map(str, loading_info.get(kind) or ()))
        if names:
            raise ExportRefused(f"export refused: transformers reports {kind.replace('_', ' ')}: {names[0]}")
    hf = hf.to(device)
    if adapter:
        hf = attach_adapter(hf, directory, device)
    hf.eval()
    with computing_in(hf, torch.float32):
        exact = _logits(hf, tokens, device)
    if not bf16:
        return exact, None
    with computing_in(hf, torch.bfloat16):
        return exact, _logits(hf, tokens, device)


def _logits(hf: torch.nn.Module, tokens: list[torch.Tensor], device: str) -> list[torch.Tensor]:
    """In fp32 on the CPU."""
    return [hf(prompts.to(device)).logits.float().cpu() for prompts in tokens]


@contextmanager
def computing_in(model: torch.nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Let each module have its parameters in `dtype` while it runs; an adapter's, which are small, all the time."""

    stored: dict[torch.nn.Module, dict[str, torch.Tensor]] = {}

    def enter(module: torch.nn.Module, args: object) -> None:
        stored[module] = {name: p.data for name, p in module.named_parameters(recurse=False)}
        for p in module.parameters(recurse=False):
            p.data = p.data.to(dtype)

    def leave(module: torch.nn.Module, args: object, output: object) -> None:
        for name, data in stored.pop(module).items():
            getattr(module, name).data = data

    handles: list[RemovableHandle] = []
    for name, module in model.named_modules():
        if ".lora_" in name:
            module.to(dtype)
        elif next(module.parameters(recurse=False), None) is not None:
            handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
