"""What a directory of safetensors files holds, from its headers alone: no weight is read, nothing heavy is imported."""

import json
import os
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, TypeGuard

from posttrain.errors import UserError

INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
COMPARED = 1 << 22  # bytes at a time
MAX_HEADER = 100_000_000  # bytes; the format's own limit
MAX_NAME, MAX_DIMENSIONS, MAX_NUMBER = 1000, 16, 1 << 63  # of a tensor; characters of the name
MAX_REASON = 500  # characters of a name or shape in an error
MAX_JSON = 200 << 20  # bytes; the largest tokenizer.json known is a tenth of it
BITS = {
    "F64": 64,
    "I64": 64,
    "U64": 64,
    "C64": 64,
    "F32": 32,
    "I32": 32,
    "U32": 32,
    "BF16": 16,
    "F16": 16,
    "I16": 16,
    "U16": 16,
    "I8": 8,
    "U8": 8,
    "BOOL": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F4": 4,
}


@dataclass(frozen=True)
class Tensor:
    """One tensor's entry: its shape, its dtype in the format's words (BF16, F32), the file that holds it and where.

    `place` is (first byte, byte after the last) in the file.
    """

    shape: tuple[int, ...]
    dtype: str
    file: Path
    place: tuple[int, int] = (0, 0)


def read_headers(directory: Path) -> dict[str, Tensor]:
    """Return every tensor of the safetensors files of `directory`, by name.

    Raises:
        UserError: pickled weights instead of safetensors, no weights, a shard that the index names and that is not
            there, a file that is cut short or damaged, or a tensor that the index promises and no file holds.
    """
    indexed = _read_index(directory / INDEX)
    files = sorted(set(indexed.values()))
    if not files:
        files = sorted(file.name for file in directory.glob("*.safetensors"))
    if not files:
        raise UserError(no_weights(directory))
    tensors: dict[str, Tensor] = {}
    for file in files:
        for name, tensor in read_header(directory / file).items():
            if indexed.get(name, file) == file:
                tensors[name] = tensor
    missing = sorted(set(indexed) - set(tensors))
    if missing:
        raise UserError(f"{directory}: {INDEX} lists {missing[0]} (and {len(missing) - 1} more), which no file holds")
    return tensors


def _read_index(index: Path) -> dict[str, str]:
    """Tensor -> file beside the index; empty where there is no index.

    Raises:
        UserError: it maps something else.
    """
    if not index.is_file():
        return {}
    weight_map = read_json(index).get("weight_map")
    if not _names_files(weight_map):
        raise UserError(f"{index}: damaged: weight_map must say for each tensor in which file beside it it is")
    return weight_map


def read_header(file: Path) -> dict[str, Tensor]:
    """Return the tensors of one safetensors file (format: https://github.com/huggingface/safetensors#format)."""
    if not file.is_file():
        raise UserError(f"{file}: this shard is missing; download the model again")
    size = file.stat().st_size
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")  # of a shorter file: more than it has
        if not 2 <= length <= min(MAX_HEADER, size - 8):
            raise UserError(f"{file}: not a safetensors file, or cut short ({size} bytes); download it again")
        try:
            header = json.loads(stream.read(length), object_pairs_hook=_without_repetition, parse_int=_whole)
            _check_metadata(header.pop("__metadata__", None))
            end = 8 + length + _length(header)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            reason = str(error)[:MAX_REASON]
            raise UserError(f"{file}: its header is damaged ({reason}); download it again") from error
    tensors = {}
    for name, entry in header.items():
        begin, stop = entry["data_offsets"]
        tensors[name] = Tensor(tuple(entry["shape"]), entry["dtype"], file, (8 + length + begin, 8 + length + stop))
    if size != end:
        raise UserError(
            f"{file}: has {size} bytes, its header says {end}; it was cut short or damaged: download it again"
        )
    return tensors


def same_content(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of readable files are equal, bit for bit."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    left = one.place[1] - one.place[0]
    with open(one.file, "rb") as first, open(other.file, "rb") as second:
        first.seek(one.place[0])
        second.seek(other.place[0])
        while left > 0:
            size = min(left, COMPARED)
            if first.read(size) != second.read(size):
                return False
            left -= size
    return True


def _names_files(weight_map: object) -> TypeGuard[dict[str, str]]:
    """Whether an index's map is one from tensors to plain names of safetensors files."""
    if not isinstance(weight_map, dict):
        return False
    for name in weight_map.values():
        if not isinstance(name, str) or not name.endswith(".safetensors") or Path(name).name != name:
            return False
    return True


def _length(header: dict[str, Any]) -> int:
    """Bytes of the tensors, one after the other without gaps, each as long as its shape and dtype say.

    Raises:
        ValueError: they are not.
    """
    at = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = entry["data_offsets"]
        shape, dtype = entry["shape"], entry["dtype"]
        if len(name) > MAX_NAME or len(shape) > MAX_DIMENSIONS:
            raise ValueError(f"{name[:MAX_NAME]}: a name of {len(name)} characters, or {len(shape)} dimensions")
        if dtype not in BITS:
            raise ValueError(f"{name} has the dtype {dtype}, which the format doesn't have")
        if not all(type(number) is int and 0 <= number < MAX_NUMBER for number in (begin, end, *shape)) or begin != at:
            raise ValueError(f"{name} lies at {begin} to {end}, expected at {at}")
        if 8 * (end - begin) != BITS[dtype] * prod(shape):
            raise ValueError(f"{name} has {end - begin} bytes for the shape {shape} in {dtype}")
        at = end
    return at


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, of which each name is there once: readers differ in which of several they take."""
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the name {twice[:MAX_REASON]!r} occurs twice")
    return found


def _whole(digits: str) -> int:
    """A whole number of JSON; Python takes long for thousands of digits."""
    if len(digits) > len(str(MAX_NUMBER)):
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _check_metadata(metadata: object) -> None:
    """Texts by name, or nothing: the library refuses all else."""
    if metadata is None:
        return
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("__metadata__ must map names to texts")


def no_weights(directory: Path) -> str:
    """Say what to do about a model directory without safetensors."""
    pickles: list[str] = []
    for pattern in PICKLES:
        pickles += [file.name for file in directory.glob(pattern)]
    if not pickles:
        return f"{directory}: no *.safetensors in it; give a directory with weights, or set model.random_init=true"
    pickle = min(pickles)
    return (
        f"{directory}: {pickle} is a pickle, which can run code when it is read, so only safetensors are accepted. "
        'If you trust its source, convert it once: python -c "from transformers import AutoModelForCausalLM as M; '
        f"M.from_pretrained('{directory}', dtype='auto').save_pretrained('NEW_DIR')\""
    )


def own_file(file: Path, folder: bool = False) -> bool:
    """Whether `file` is there: a regular file of its directory's own, of up to MAX_JSON bytes.

    A link has to stay within the directory, or lead to the blobs of the hub's cache, which is made of such links. Any
    other link could have a file of this machine's read, and copied into what is published.

    Args:
        file: what to look at.
        folder: expect a folder instead.

    Raises:
        UserError: it is something else.
    """
    if not os.path.lexists(file):
        return False
    directory, target = file.parent.resolve(), file.resolve()
    if not target.is_relative_to(directory) and target.parent != _blobs(directory):
        raise UserError(f"{file}: is a link that leads out of its directory, to {target}; put the file itself there")
    if folder and target.is_dir():
        return True
    if folder or not target.is_file():
        kind = "folder" if folder else "regular file"
        raise UserError(f"{file}: is not a {kind}")
    if target.stat().st_size > MAX_JSON:
        raise UserError(f"{file}: has {target.stat().st_size} bytes, more than the {MAX_JSON >> 20} MiB of such a file")
    return True


def _blobs(directory: Path) -> Path | None:
    """Where the hub's cache has the files of `directory`, `.../snapshots/REVISION` or below it."""
    for inner in (directory, *directory.parents):
        if inner.parent.name == "snapshots":
            return inner.parent.parent / "blobs"
    return None


def read_optional_json(file: Path) -> dict[str, Any]:
    """As `read_json`, but empty where there is no file."""
    return read_json(file) if file.is_file() else {}


def read_json(file: Path) -> dict[str, Any]:
    """Return the JSON object in `file`; a UserError where it is not there, not a JSON object, or no file of its own."""
    try:
        own_file(file)
        content = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=_without_repetition)
    except FileNotFoundError:
        raise UserError(f"{file}: not found; model.path must be a Hugging Face model directory") from None
    except OSError as error:
        raise UserError(f"{file}: can't be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{file}: not valid: expected a JSON object, found {type(content).__name__}")
    return content
