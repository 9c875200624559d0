"""Ask a trained model: `python -m posttrain.generate RUN_OR_MODEL [PROMPT ...]`.

RUN_OR_MODEL is a run directory, a PEFT adapter, or a Hugging Face directory. Prompts come from the command line, from a
file (one per line), or, without either, from the keyboard as a chat. The exported model answers through transformers
with its key-value cache.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from posttrain.errors import UserError


def exported(path: Path) -> Path:
    """The Hugging Face directory that `path` means.

    Raises:
        UserError: there is no such directory, or it holds no finished export.
    """
    if not path.is_dir():
        raise UserError(f"{path}: no such directory")
    for candidate in (path, path / "adapter", path / "hf"):
        if (candidate / "adapter_config.json").is_file() or (candidate / "config.json").is_file():
            return candidate
    if (path / "config.yaml").is_file():
        raise UserError(f"{path}: this run has no finished export (see its status.json); run it again to go on")
    raise UserError(f"{path}: neither a run directory, an adapter nor a Hugging Face model")


def load(path: Path) -> tuple[Any, Any]:
    """(model, tokenizer) of an export, on the GPU if there is one."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    adapter = path / "adapter_config.json"
    base = json.loads(adapter.read_text())["base_model_name_or_path"] if adapter.is_file() else str(path)
    if adapter.is_file() and Path(base).is_absolute() and not Path(base).is_dir():
        raise UserError(f"{adapter}: its base model {base} is not there any more")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, use_safetensors=True)
    if adapter.is_file():
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, path)
    return model.to(device).eval(), AutoTokenizer.from_pretrained(path)


def answer(model: Any, tokenizer: Any, messages: list[dict[str, str]], settings: argparse.Namespace) -> str:
    """The model's next message; without a chat template the last message is continued as plain text."""
    import torch

    if tokenizer.chat_template:
        batch = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        batch = tokenizer(messages[-1]["content"], return_tensors="pt")
    batch = {key: value.to(model.device) for key, value in batch.items() if key in ("input_ids", "attention_mask")}
    sampling = {"do_sample": False}
    if settings.temperature > 0:
        sampling = {"do_sample": True, "temperature": settings.temperature, "top_p": settings.top_p}
    stop = {tokenizer.eos_token_id, *_as_list(model.generation_config.eos_token_id)} - {None}
    with torch.no_grad():
        out = model.generate(
            **batch, **sampling, max_new_tokens=settings.max_new_tokens, eos_token_id=sorted(stop),
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(stop),
        )  # fmt: skip
    return tokenizer.decode(out[0, batch["input_ids"].size(1) :], skip_special_tokens=True)


def _as_list(value: Any) -> list[int]:
    return value if isinstance(value, list) else [value]


def keyboard() -> Iterator[str]:
    """Lines typed until an empty one or the end of input."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if not line:
            return
        yield line


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m posttrain.generate", description=__doc__.splitlines()[0])
    made.add_argument("model", type=Path, help="run directory, PEFT adapter or Hugging Face directory")
    made.add_argument("prompts", nargs="*", help="what to ask; nothing: a chat")
    made.add_argument("--file", type=Path, help="a file with one prompt per line")
    made.add_argument("--system", help="system prompt")
    made.add_argument("--max-new-tokens", type=int, default=256)
    made.add_argument("--temperature", type=float, default=0.0, help="0: the most likely token each time")
    made.add_argument("--top-p", type=float, default=1.0, help="sample from the most likely tokens of this total")
    made.add_argument("--seed", type=int, default=0, help="of the sampling")
    made.add_argument("--json", action="store_true", help="one JSON object per answer")
    return made


def main() -> None:
    """Entry point."""
    from posttrain.compose import fail

    settings = parser().parse_intermixed_args()
    try:
        path = exported(settings.model)
        if settings.file is not None and not settings.file.is_file():
            raise UserError(f"--file {settings.file}: no such file")
        model, tokenizer = load(path)
    except UserError as error:
        fail(str(error))
    import torch

    torch.manual_seed(settings.seed)
    lines = settings.file.read_text(encoding="utf-8").splitlines() if settings.file else []
    batch = [*settings.prompts, *(line for line in lines if line.strip())]
    start = [{"role": "system", "content": settings.system}] if settings.system else []
    history = list(start)
    for prompt in batch or keyboard():
        history = [*(start if batch else history), {"role": "user", "content": prompt}]
        text = answer(model, tokenizer, history, settings)
        history.append({"role": "assistant", "content": text})
        print(json.dumps({"prompt": prompt, "answer": text}, ensure_ascii=False) if settings.json else text, flush=True)


if __name__ == "__main__":
    main()
