"""Checkpoints hold pickles (torch's .metadata and every object in a shard): nothing in them may name code to run.

The interpreter reports each name that any unpickler looks up, in whatever file and library, as the audit event
`pickle.find_class` (PEP 578). While a checkpoint is read, names beyond the plain containers and tensors that a
checkpoint is made of are refused before they are looked up.

A TorchScript archive is code as well, and torch.load hands one to torch.jit.load, whose reader in C++ reports nothing:
archives of that kind are refused before it sees them.
"""

import contextlib
import pickle
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import torch

from posttrain.config import targets
from posttrain.errors import UserError

KNOWN = (
    r"collections OrderedDict|(builtins|__builtin__) (set|frozenset|slice|complex|bytearray|range)|_codecs encode",
    r"datetime timedelta|pathlib\w* (Posix|PurePosix)?Path",
    r"numpy(\._?core)?(\.multiarray)? (_reconstruct|scalar|ndarray|dtype)|numpy\.dtypes \w+DType",
    r"torch (Size|device|dtype|memory_format|u?int\d+|b?float\d+\w*|complex\d+|bool|\w+Storage)",
    # Transformer Engine's state of fp8; a tensor's bytes are a pickle of their own, looked at as well.
    # Megatron puts its own in the place of torch's function, under whose name a storage is then pickled.
    r"_io BytesIO|torch\.storage _load_from_bytes|megatron\.core\.safe_globals safe_load_from_bytes",
    r"torch\.storage (Untyped|Typed)Storage|torch\.serialization _get_layout|torch\.nn\.parameter Parameter",
    r"torch\._C Generator",  # of the random numbers of a captured step; holds its device and state
    r"torch\._utils _rebuild_(tensor(_v2)?|parameter(_with_state)?|device_tensor_from_numpy)",
    r"torch\.distributed\.checkpoint\.metadata _?[A-Z]\w*",
    r"torch\.distributed\.checkpoint\.(planner|storage|filesystem|api) _?(StorageInfo|\w+Plan|\w+Item|\w+ItemType|"
    r"TensorWriteData|WriteResult|CheckpointException|StoragePrefix|WrappedException)",
    r"megatron\.core\.dist_checkpointing\.mapping (Sharded|Local)\w+",
    r"megatron\.core\.dist_checkpointing\.core Checkpointing\w+",
    r"transformer_engine\.common\.recipe _?[A-Z]\w*",
    r"torch\.distributed\.(tensor\.placement_types|_tensor\.placement_types) (Shard|Replicate|Partial)",
    r"torch\.distributed\.tensor\._dtensor_spec (DTensorSpec|TensorMeta)",
)

WEIGHTS_ONLY = "Weights only load failed"  # torch's own refusal, where Megatron's function has it load weights alone

_reading: list[Path] = []
_refused: list[str] = []
_hooked = False
_is_torchscript = torch.serialization._is_torchscript_zip  # what torch.load asks of each archive
_jit_load = torch.jit.load


@contextlib.contextmanager
def reading(checkpoint: Path) -> Iterator[None]:
    """Read `checkpoint` within: unpicklers of this process find only what a checkpoint is made of.

    Raises:
        UserError: it names something else.
    """
    global _hooked
    if not _hooked:
        sys.addaudithook(_look)  # can't be taken away again; idle outside of `reading`
        _hooked = True
    _reading.append(checkpoint)
    _refused.clear()
    torch.serialization._is_torchscript_zip = _no_torchscript
    torch.jit.load = _refuse_torchscript
    try:
        yield
    except BaseException as error:
        if _refused:
            raise UserError(_refused[0]) from error
        if isinstance(error, pickle.UnpicklingError) and WEIGHTS_ONLY in str(error):
            name = re.search(r"GLOBAL (\S+)", str(error))
            raise UserError(
                f"{checkpoint}: holds a pickle that would run {name[1] if name else 'code'} within a tensor's bytes; a "
                "checkpoint needs no such thing, so it was not read"
            ) from error
        raise
    finally:
        _reading.pop()
        if not _reading:
            torch.serialization._is_torchscript_zip = _is_torchscript
            torch.jit.load = _jit_load


def allowed(module: str, name: str) -> bool:
    """Whether a checkpoint may name `name` of `module`; a dotted name reaches what a module imports, so never."""
    if any(re.fullmatch(pattern, f"{module} {name}") for pattern in KNOWN):
        return True
    return targets.allowed_by_user(module) and targets.is_own(f"{module}.{name}", "checkpoint")


def _from_a_peer() -> bool:
    """Whether what is unpickled comes from another rank: torch's collectives for objects pickle them."""
    code = sys._getframe(2).f_code  # this function, `_look`, then whoever called the unpickler
    return code.co_name == "_tensor_to_object" and code.co_filename.endswith("torch/distributed/distributed_c10d.py")


def _no_torchscript(archive: object) -> bool:
    """False, or a refusal, in place of torch's own question about an archive that torch.load is to read."""
    if _is_torchscript(archive):
        _refuse_torchscript()
    return False


def _refuse_torchscript(*_: object, **__: object) -> NoReturn:
    _refused.append(
        f"{_reading[-1]}: holds a TorchScript archive, which is a program; a checkpoint needs no such thing, so it was "
        "not read"
    )
    raise UserError(_refused[-1])


def _look(event: str, arguments: tuple[object, ...]) -> None:
    if event != "pickle.find_class" or not _reading or _from_a_peer():
        return
    module, name = arguments[-2:]
    if not allowed(str(module), str(name)):
        _refused.append(
            f"{_reading[-1]}: holds a pickle that would run {module}.{name}; a checkpoint needs no such thing, so it "
            f"was not read. If it is your own: allow it with the environment variable {targets.ENVIRONMENT}={module}"
        )
        raise UserError(_refused[-1])
