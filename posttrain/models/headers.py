"""What a directory of safetensors files holds, from its headers alone: no weight is read, nothing heavy is imported."""

import json
import struct
from dataclasses import dataclass
from pathlib import Path

from posttrain.errors import UserError

INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
MAX_HEADER = 100_000_000  # bytes; the format's own limit


@dataclass(frozen=True)
class Tensor:
    """One tensor's entry: its shape, its dtype in the format's words (BF16, F32), and the file that holds it."""

    shape: tuple[int, ...]
    dtype: str
    file: Path


def read_headers(directory: Path) -> dict[str, Tensor]:
    """Return every tensor of the safetensors files of `directory`, by name.

    Raises:
        UserError: pickled weights instead of safetensors, no weights, a shard that the index names and that is not
            there, a file that is cut short or damaged, or a tensor that the index promises and no file holds.
    """
    index = directory / INDEX
    promised = read_json(index)["weight_map"] if index.is_file() else None
    files = sorted(set(promised.values())) if promised else sorted(f.name for f in directory.glob("*.safetensors"))
    if not files:
        raise UserError(no_weights(directory))
    tensors = {name: tensor for file in files for name, tensor in read_header(directory / file).items()}
    if missing := sorted(set(promised or ()) - set(tensors)):
        raise UserError(f"{directory}: {INDEX} lists {missing[0]} (and {len(missing) - 1} more), which no file holds")
    return tensors


def read_header(file: Path) -> dict[str, Tensor]:
    """Return the tensors of one safetensors file (format: https://github.com/huggingface/safetensors#format)."""
    if not file.is_file():
        raise UserError(f"{file}: this shard is missing; download the model again")
    size = file.stat().st_size
    with open(file, "rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(MAX_HEADER, size - 8):
            raise UserError(f"{file}: not a safetensors file, or cut short ({size} bytes); download it again")
        try:
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            tensors = {name: Tensor(tuple(e["shape"]), e["dtype"], file) for name, e in header.items()}
            end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{file}: its header is damaged ({error}); download it again") from error
    if size != end:
        raise UserError(
            f"{file}: has {size} bytes, its header says {end}; it was cut short or damaged: download it again"
        )
    return tensors


def no_weights(directory: Path) -> str:
    """Say what to do about a model directory without safetensors."""
    pickles = sorted(file.name for pattern in PICKLES for file in directory.glob(pattern))
    if not pickles:
        return f"{directory}: no *.safetensors in it; give a directory with weights, or set model.random_init=true"
    return (
        f"{directory}: {pickles[0]} is a pickle, which can run code when it is read, so only safetensors are accepted. "
        'If you trust its source, convert it once: python -c "from transformers import AutoModelForCausalLM as M; '
        f"M.from_pretrained('{directory}', dtype='auto').save_pretrained('NEW_DIR')\""
    )


def read_json(file: Path) -> dict:
    """Return the JSON object in `file`; a UserError where it is not there or not JSON."""
    try:
        return json.loads(file.read_text())
    except FileNotFoundError:
        raise UserError(f"{file}: not found; model.path must be a Hugging Face model directory") from None
    except ValueError as error:
        raise UserError(f"{file}: not valid JSON ({error})") from error
