"""What a run reads besides its configuration: training rows, the model's shape, the frozen weights under an adapter.

A run that resumes must find all of it as it was: places in the data mean other rows in another file, and an adapter
belongs to the weights that it was trained on. No torch here.
"""

import hashlib
from pathlib import Path
from typing import Any

from posttrain.errors import UserError

BLOCK, BLOCKS = 1 << 16, 16  # bytes, and how many of them stand for a file of weights: training changes every tensor
WHAT = {
    "data": "the training rows of data.path",
    "config": "config.json of model.path",
    "weights": "the weights of model.path, which the adapter was trained on,",
}


def of(trainer: Any) -> dict[str, str]:
    """Digests of what `trainer` reads: `data`; `config` of a model that isn't random; `weights` under an adapter."""
    train = trainer.splits.report["train"]
    rows = [trainer.splits.report["sha256"].get("data.path"), len(trainer.splits.train), train["tokens"]]
    found = {"data": _digest(repr(rows).encode())}
    if not trainer.model.random_init:
        directory = trainer.model.directory
        found["config"] = _digest((directory / "config.json").read_bytes())
        if trainer.peft is not None:
            found["weights"] = weights(directory)
    return found


def weights(directory: Path) -> str:
    """A digest of each safetensors file's size, beginning (with the tensors' names and shapes) and some of the rest."""
    found = hashlib.sha256()
    for path in sorted(directory.glob("*.safetensors")):
        size = path.stat().st_size
        found.update(f"{path.name} {size} ".encode())
        with open(path, "rb") as file:
            for index in range(BLOCKS):
                file.seek(index * max(0, size - BLOCK) // (BLOCKS - 1))
                found.update(file.read(BLOCK))
    return found.hexdigest()


def check(before: dict[str, str], now: dict[str, str], checkpoint: Path) -> None:
    """Compare with what a checkpoint was saved with; older ones don't say.

    Raises:
        UserError: something has changed.
    """
    changed = [what for name, what in WHAT.items() if name in before and name in now and before[name] != now[name]]
    if changed:
        raise UserError(
            f"{checkpoint}: {' and '.join(changed)} changed since it was saved; put back what was there, or choose "
            "another hydra.run.dir to start from the beginning"
        )


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
