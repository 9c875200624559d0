"""What a run reads besides its configuration: rows, the model's shape, the frozen weights under an adapter.

A resumed run must find all of it unchanged: positions in the data mean other rows in another file, and an adapter
belongs to the weights that it was trained on. No torch here.
"""

import hashlib
from pathlib import Path

from posttrain.data.training_data import Splits
from posttrain.errors import UserError
from posttrain.models import HFModel

# So many blocks of so many bytes stand for a file of weights: training changes every tensor.
BLOCKS = 16
BLOCK_BYTES = 1 << 16
INPUTS = {
    "data": "the training rows of data.path",
    "validation": "the rows of data.validation_path",
    "config": "config.json of model.path",
    "weights": "the weights of model.path, which the adapter was trained on,",
}


def inputs_of(splits: Splits, model: HFModel, adapter: bool) -> dict[str, str]:
    """Digests of what a run reads: `data`, `validation`, `config` of a model that isn't random, `weights` of adapters.

    Args:
        splits: its packed data.
        model: before training.
        adapter: whether an adapter is trained.
    """
    train = splits.report["train"]
    rows = [splits.report["sha256"].get("data.path"), len(splits.train), train["tokens"]]
    digests = {"data": _digest(repr(rows).encode())}
    validation = splits.report["sha256"].get("data.validation_path")
    if validation:
        digests["validation"] = _digest(repr(validation).encode())
    if not model.random_init:
        digests |= of_model(model.directory, adapter)
    return digests


def of_model(directory: Path, adapter: bool) -> dict[str, str]:
    """Digests of a model's directory: `config`, and `weights` where an `adapter` is trained on them."""
    digests = {"config": _digest((directory / "config.json").read_bytes())}
    if adapter:
        digests["weights"] = weights(directory)
    return digests


def weights(directory: Path) -> str:
    """A digest of each safetensors file's size, beginning (with the tensors' names and shapes) and some of the rest."""
    digest = hashlib.sha256()
    for path in sorted(directory.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with open(path, "rb") as file:
            for index in range(BLOCKS):
                file.seek(index * max(0, size - BLOCK_BYTES) // (BLOCKS - 1))
                digest.update(file.read(BLOCK_BYTES))
    return digest.hexdigest()


def check(before: dict[str, str], now: dict[str, str], checkpoint: Path) -> None:
    """Compare with what a checkpoint was saved with; older ones don't say.

    Raises:
        UserError: something has changed.
    """
    refuse(changed(before, now), checkpoint)


def refuse(different: list[str], checkpoint: Path) -> None:
    """Refuse to resume from a checkpoint where something has changed.

    Args:
        different: what, in words.
        checkpoint: to resume from.

    Raises:
        UserError: that is not empty.
    """
    if different:
        raise UserError(
            f"{checkpoint}: {' and '.join(different)} changed since it was saved; put back what was there, or choose "
            "another hydra.run.dir to start from the beginning"
        )


def changed(before: dict[str, str], now: dict[str, str]) -> list[str]:
    """What differs between two sets of digests, in words; what one of them lacks isn't known."""
    found = []
    for name, description in INPUTS.items():
        if name in before and name in now and before[name] != now[name]:
            found.append(description)
    return found


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
