"""Speed and memory of `python -m posttrain.convert`, beside the disk's own speed: `python bench/conversion.py DIR`.

Writes a random bf16 model of Llama-3-8B's shapes to DIR (which needs four times its size), then imports, exports and
merges it, each command by itself, on files that were dropped from the page cache before. `--layers 32` is the whole
8B (16 GB). The disk: a file of the model's size written and flushed, dropped from the cache and read, before and after.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from posttrain.convert.shards import ShardWriter

HIDDEN, INNER, HEADS, GROUPS, VOCABULARY, RANK = 4096, 14336, 32, 8, 128256, 16
MATRICES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (HIDDEN // HEADS * GROUPS, HIDDEN),
    "self_attn.v_proj": (HIDDEN // HEADS * GROUPS, HIDDEN), "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN), "mlp.down_proj": (HIDDEN, INNER),
}  # fmt: skip


def random_matrix(*shape: int) -> torch.Tensor:
    """Random numbers of a trained matrix's size, in bf16."""
    return torch.randn(shape, dtype=torch.bfloat16).mul_(0.02)


def write_model(directory: Path, layers: int) -> None:
    """A Hugging Face directory: weights in shards of 5 GB, config, a tokenizer."""
    directory.mkdir()
    writer = ShardWriter(directory)
    writer.add("model.embed_tokens.weight", random_matrix(VOCABULARY, HIDDEN))
    for layer in range(layers):
        for name, shape in MATRICES.items():
            writer.add(f"model.layers.{layer}.{name}.weight", random_matrix(*shape))
        for name in ("input_layernorm", "post_attention_layernorm"):
            writer.add(f"model.layers.{layer}.{name}.weight", 1 + random_matrix(HIDDEN))
    writer.add("model.norm.weight", 1 + random_matrix(HIDDEN))
    writer.add("lm_head.weight", random_matrix(VOCABULARY, HIDDEN))
    writer.close()
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": HIDDEN, "intermediate_size": INNER,
        "num_hidden_layers": layers, "num_attention_heads": HEADS, "num_key_value_heads": GROUPS,
        "vocab_size": VOCABULARY, "max_position_embeddings": 8192, "rope_theta": 500000.0, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    alphabet = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(alphabet, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(directory)


def write_adapter(directory: Path, base: Path, layers: int) -> None:
    """A PEFT directory: LoRA on every matrix."""
    directory.mkdir()
    tensors = {}
    for layer in range(layers):
        for name, (rows, columns) in MATRICES.items():
            prefix = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{prefix}.lora_A.weight"] = random_matrix(RANK, columns).float()
            tensors[f"{prefix}.lora_B.weight"] = random_matrix(rows, RANK).float()
    save_file(tensors, directory / "adapter_model.safetensors")
    names = [name.rpartition(".")[2] for name in MATRICES]
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 32, "target_modules": names, "task_type": "CAUSAL_LM"}
    (directory / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(base)}))


def drop(path: Path) -> None:
    """Have the kernel forget the files' pages: what is read next comes from the disk."""
    for file in [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]:
        with open(file, "rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def disk(file: Path, size: int) -> tuple[float, float]:
    """GB/s of writing `size` bytes in order and flushing them, and of reading them."""
    block = os.urandom(2**24)
    start = time.perf_counter()
    with open(file, "wb", buffering=0) as stream:
        for _ in range(size // len(block)):
            stream.write(block)
        os.fsync(stream.fileno())
    written = time.perf_counter() - start
    drop(file)
    start = time.perf_counter()
    with open(file, "rb", buffering=0) as stream:
        while stream.readinto(bytearray(len(block))):
            pass
    read = time.perf_counter() - start
    file.unlink()
    return size / written / 1e9, size / read / 1e9


def convert(words: list[str], size: int) -> None:
    """Run one command; print its speed, with all that the process does, and its memory."""
    command = [sys.executable, "-m", "posttrain.convert", *words]
    start, own, mapped = time.perf_counter(), 0, 0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        fields = dict(line.split(":", 1) for line in Path(f"/proc/{process.pid}/status").read_text().splitlines())
        own = max(own, int(fields.get("RssAnon", "0").split()[0]))
        mapped = max(mapped, int(fields.get("RssFile", "0").split()[0]))
        time.sleep(0.02)
    seconds = time.perf_counter() - start
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {process.returncode}")
    name = " ".join(word for word in words if "=" not in word or "verify" in word)
    print(
        f"| {name} | {seconds:.0f} | {size / seconds / 1e9:.2f} | {own / 2**20:.1f} | {mapped / 2**20:.1f} |",
        flush=True,
    )


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, help="an empty or new directory on the disk to measure")
    parser.add_argument("--layers", type=int, default=32)
    arguments = parser.parse_args()
    root = arguments.directory.resolve()
    root.mkdir(parents=True, exist_ok=True)
    model, megatron, adapter, out = (root / name for name in ("model", "megatron", "adapter", "out"))
    write_model(model, arguments.layers)
    write_adapter(adapter, model, arguments.layers)
    size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    print(f"{size / 1e9:.1f} GB of bf16 weights; disk, write and read: {disk(root / 'file', size)} GB/s", flush=True)
    print("| command | s | GB/s | own memory, GiB | mapped files, GiB |\n|---|---|---|---|---|")
    for words, source, keep in (
        (["import", f"model.path={model}", f"convert.out={megatron}"], model, True),
        (["export", f"checkpoint={megatron}", f"convert.out={out}", "convert.verify=false"], megatron, False),
        (["export", f"checkpoint={megatron}", f"convert.out={out}"], megatron, False),
        (["merge", f"checkpoint={adapter}", f"convert.out={out}"], model, False),
    ):
        drop(source)
        convert(words, size)
        if not keep:
            shutil.rmtree(out)
    shutil.rmtree(megatron)
    print(f"disk again: {disk(root / 'file', size)} GB/s")
    shutil.rmtree(root)


if __name__ == "__main__":
    main()
