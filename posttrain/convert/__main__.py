"""Convert weights on a CPU: `python -m posttrain.convert import|export|merge`, with the words of every command.

    python -m posttrain.convert import model.path=HF_DIR convert.out=DIR    Hugging Face -> Megatron checkpoint
    python -m posttrain.convert export checkpoint=RUN_DIR convert.out=DIR   checkpoint -> Hugging Face, or PEFT adapter
    python -m posttrain.convert merge checkpoint=RUN_DIR convert.out=DIR    base + adapter -> Hugging Face

`checkpoint` is a run directory, its checkpoints directory, or one iter_* directory; for `merge` a PEFT directory too.
"""

import contextlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from posttrain import check, compose, schema, targets
from posttrain.convert import process
from posttrain.errors import UserError

COMMANDS = ("import", "export", "merge")
DTYPES = ("float32", "bfloat16")


@dataclass
class ConvertSchema:
    """conf/convert.yaml."""

    command: str = MISSING
    checkpoint: str | None = None
    out: str | None = None
    overwrite: bool = False
    dtype: str | None = None
    verify: bool = True


@dataclass
class ConvertConfig:
    """A model, and what to do with it."""

    model: schema.ModelSchema = MISSING
    convert: ConvertSchema = field(default_factory=ConvertSchema)


ConfigStore.instance().store(name="schema_convert", node=ConvertConfig)


def main() -> None:
    """Entry point; exits with 2 after a mistake of the user's, with 1 when an export is refused."""
    words = [word for word in sys.argv[1:] if word in COMMANDS]
    if {"-h", "--help"} & set(sys.argv[1:]) or len(words) != 1:
        print(__doc__.strip())
        raise SystemExit(0 if {"-h", "--help"} & set(sys.argv[1:]) else 2)
    rest = [word for word in sys.argv[1:] if word not in COMMANDS]
    # `checkpoint` by itself is a configuration group of training.
    rest = [f"convert.{word}" if word.startswith("checkpoint=") else word for word in rest]
    sys.argv[1:] = [f"convert.command={words[0]}", *rest]
    compose.run(run, config_name="convert")


def run(cfg: DictConfig) -> None:
    """Do what a composed configuration says.

    Raises:
        UserError: a key is missing or wrong, or what is to be converted can't be.
    """
    targets.check(cfg)
    c = cfg.convert
    if c.out is None:
        raise UserError("`convert.out`: has no value; give the directory to write")
    if c.dtype not in (None, *DTYPES):
        raise UserError(f"`convert.dtype={c.dtype}`: must be one of {', '.join(DTYPES)}")
    from posttrain.convert.publish import check_free

    out = Path(c.out).expanduser()
    check_free(out, c.overwrite)
    if c.command == "import":
        if OmegaConf.is_missing(cfg.model, "path"):
            raise UserError("`model.path`: has no value; give a Hugging Face directory or a hub id")
        check.model(cfg)
        import_(cfg, out)
    elif c.checkpoint is None:
        raise UserError("`checkpoint`: has no value; give a run directory, or one of its checkpoints")
    elif c.command == "export":
        export(cfg, out)
    else:
        from posttrain.convert.merge import merge

        merge(Path(c.checkpoint).expanduser(), out, c.overwrite, c.dtype)
    print(f"written: {out}")


def import_(cfg: DictConfig, out: Path) -> None:
    """Check the Hugging Face directory, then start Megatron and convert."""
    from hydra.utils import instantiate

    model = instantiate(cfg.model)
    _ = model.directory  # checked before Megatron's long import
    with quiet():
        process.start()
        from posttrain.convert.megatron import import_model

        import_model(model, out, cfg.convert.overwrite, cfg.convert.dtype)


def export(cfg: DictConfig, out: Path) -> None:
    """Find the checkpoint, then start Megatron and convert."""
    from posttrain.convert.checkpoints import find

    found = find(Path(cfg.convert.checkpoint).expanduser())
    if found.peft and cfg.convert.dtype:
        raise UserError(f"`convert.dtype={cfg.convert.dtype}`: {found.directory} is an adapter's; give it to merge")
    with quiet():
        process.start()
        from posttrain.convert.megatron import export_checkpoint

        export_checkpoint(found, out, cfg.convert.overwrite, cfg.convert.verify, cfg.convert.dtype)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep what Megatron prints, warns and logs from the terminal."""
    os.environ["TQDM_DISABLE"] = "1"
    logging.disable(logging.WARNING)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


if __name__ == "__main__":
    main()
