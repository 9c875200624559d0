"""What transformers (and PEFT) make of a directory, in fp32 or bf16 arithmetic, with its weights where they lie."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from posttrain.errors import RunFailed
from posttrain.models.headers import read_headers
from posttrain.peft.attach import attach_adapter


class ExportRefused(RunFailed):
    """The directory is not what was trained; nothing was published."""

    restartable = False


def too_large(model: Any, directory: Path, device: str) -> str | None:
    """Why transformers can't hold the model beside the live one; None where it can.

    On the CPU its weights are the mapped files, but for experts, which transformers joins.
    """
    source = directory if (directory / "config.json").is_file() else model.directory
    sizes = {
        name: torch.Size(t.shape).numel() * (4 if t.dtype == "F32" else 2) for name, t in read_headers(source).items()
    }
    if device == "cuda":
        needed, free = 1.2 * sum(sizes.values()), torch.cuda.mem_get_info()[0]
    else:
        import psutil

        needed = 1.2 * sum(size for name, size in sizes.items() if ".experts." in name)
        free = psutil.virtual_memory().available
    if needed <= free:
        return None
    return f"transformers needs {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB of {device} memory are free"


@torch.no_grad()
def reference(directory: Path, model: Any, adapter: bool, tokens: torch.Tensor, bf16: bool, device: str) -> tuple:
    """Logits of the written directory: in fp32 arithmetic, and with `bf16` in bf16 too.

    Raises:
        ExportRefused: transformers finds a tensor missing, or one too many.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    source = model.directory if adapter else directory
    # As stored, so that the weights stay in the mapped files.
    stored = {t.dtype for t in read_headers(source).values()}
    dtype = {"BF16": torch.bfloat16, "F16": torch.float16}.get(stored.pop() if len(stored) == 1 else "", torch.float32)
    hf, found = AutoModelForCausalLM.from_pretrained(
        source, dtype=dtype, attn_implementation="eager", trust_remote_code=model.trust_remote_code,
        output_loading_info=True,
    )  # fmt: skip
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(map(str, found.get(kind) or ())):
            raise ExportRefused(f"export refused: transformers reports {kind.replace('_', ' ')}: {names[0]}")
    hf = hf.to(device)
    if adapter:
        hf = attach_adapter(hf, directory, device)
    hf.eval()
    tokens = tokens.to(device)
    logits = []
    for arithmetic in (torch.float32, torch.bfloat16) if bf16 else (torch.float32,):
        with computing_in(hf, arithmetic):
            logits.append(hf(tokens).logits.float().cpu())
    return tuple(logits)


@contextmanager
def computing_in(model: torch.nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Let each module have its parameters in `dtype` while it runs; an adapter's, which are small, all the time."""

    def enter(module, args):
        kept[module] = {name: p.data for name, p in module.named_parameters(recurse=False)}
        for p in module.parameters(recurse=False):
            p.data = p.data.to(dtype)

    def leave(module, args, output):
        for name, data in kept.pop(module).items():
            getattr(module, name).data = data

    kept: dict[torch.nn.Module, dict[str, torch.Tensor]] = {}
    handles = []
    for name, module in model.named_modules():
        if ".lora_" in name:
            module.to(dtype)
        elif any(True for _ in module.parameters(recurse=False)):
            handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
