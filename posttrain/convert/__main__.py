"""Convert weights on a CPU: `python -m posttrain.convert export|merge|import|push`, each with --help.

    python -m posttrain.convert export RUN DIR             checkpoint -> Hugging Face, or PEFT adapter
    python -m posttrain.convert merge RUN DIR              base + adapter -> Hugging Face
    python -m posttrain.convert import MODEL DIR           Hugging Face -> Megatron checkpoint
    python -m posttrain.convert push RUN OWNER/NAME        a run's export -> a model hub, private

RUN is a run directory, its checkpoints directory, or one iter_* directory; for `merge` a PEFT directory too. The words
stand for checkpoint=RUN, model.path=MODEL, convert.out=DIR and convert.repo=OWNER/NAME.
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
from shlex import quote

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from posttrain.cli import command
from posttrain.config import schema, targets
from posttrain.config.instantiate import built
from posttrain.convert import single_process
from posttrain.convert.checkpoints import find, with_step
from posttrain.convert.publish import check_apart, check_free
from posttrain.convert.training_metadata import public_name
from posttrain.errors import UserError
from posttrain.generate import load
from posttrain.spec import model_checks
from posttrain.utils import stop, working
from posttrain.utils.output_paths import check_directory
from posttrain.utils.user_paths import expand_home

PUSH = ("push", "repo", "private", "allow_unverified")


@dataclass(frozen=True)
class Command:
    """What `convert` can be told to do.

    Attributes:
        about: what it does, and what its words are.
        words: the keys that words without a key are values of, in their order.
        options: the keys of `convert` that it reads.
    """

    about: str
    words: tuple[str, str]
    options: tuple[str, ...]


COMMANDS = {
    "import": Command(
        "Import a model as a Megatron checkpoint: `python -m posttrain.convert import MODEL DIR`.\n\n"
        "MODEL is a Hugging Face directory or a hub id; DIR is written. Training needs no import: it reads MODEL.",
        ("model.path", "convert.out"),
        ("out", "overwrite", "dtype"),
    ),
    "export": Command(
        "Export a checkpoint for Hugging Face: `python -m posttrain.convert export RUN DIR`.\n\n"
        "RUN is a run directory, its checkpoints directory or one iter_* directory; DIR is written: a model for\n"
        "transformers, or a PEFT adapter where one was trained. It is compared with the checkpoint. A run makes its\n"
        "own export at its end; this is for another step.",
        ("convert.checkpoint", "convert.out"),
        ("checkpoint", "base", "out", "overwrite", "dtype", "verify", "license", *PUSH),
    ),
    "merge": Command(
        "Merge an adapter into its base model: `python -m posttrain.convert merge RUN DIR`.\n\n"
        "RUN is a run directory, a checkpoint of one, or a PEFT directory (LoRA, rsLoRA, DoRA); DIR is written, a\n"
        "model for transformers and for servers without adapters. Needs no Megatron.",
        ("convert.checkpoint", "convert.out"),
        ("checkpoint", "base", "out", "overwrite", "dtype", "license", *PUSH),
    ),
    "push": Command(
        "Put a run's export on a model hub: `python -m posttrain.convert push RUN OWNER/NAME`, with HF_TOKEN set.\n\n"
        "RUN is a run directory or an export; the repository is made private unless convert.private=false.",
        ("convert.checkpoint", "convert.repo"),
        ("checkpoint", "repo", "private", "allow_unverified"),
    ),
}
DTYPES = ("float32", "bfloat16")


@dataclass
class ConvertSchema:
    """conf/convert.yaml."""

    command: str = MISSING
    checkpoint: str | None = None
    base: str | None = None
    out: str | None = None
    overwrite: bool = False
    dtype: str | None = None
    verify: bool = True
    license: str | None = None
    push: bool = False
    repo: str | None = None
    private: bool = True
    allow_unverified: bool = False


@dataclass
class ConvertConfig:
    """A model, and what to do with it."""

    model: schema.ModelSchema = MISSING
    convert: ConvertSchema = field(default_factory=ConvertSchema)


ConfigStore.instance().store(name="schema_convert", node=ConvertConfig)


@stop.command
def main() -> None:
    """Entry point; exits with 2 after a mistake of the user's, with 1 when an export is refused."""
    named = [word for word in sys.argv[1:] if word in COMMANDS]
    if {"-h", "--help"} & set(sys.argv[1:]):
        if named:
            options = [f"convert.{name}" for name in COMMANDS[named[0]].options]
            command.show_help(COMMANDS[named[0]].about, "convert", options)
        else:
            command.show_help(__doc__, "convert")
        return
    if len(named) != 1:
        stop.fail(f"say one of {', '.join(COMMANDS)}; what each takes: python -m posttrain.convert --help")
    try:
        rest = with_keys(named[0], [word for word in sys.argv[1:] if word != named[0]])
    except UserError as error:
        stop.fail(str(error))
    for word in rest:
        group, _, _ = word.lstrip("+~").partition("=")[0].partition(".")
        if group == "model" and named[0] != "import":
            hint = "; where its base is: convert.base=DIR" if "base" in COMMANDS[named[0]].options else ""
            stop.fail(f"`{word}`: {named[0]} takes the model from its checkpoint; name none{hint}")
    sys.argv[1:] = [f"convert.command={named[0]}", *rest]
    repo_given = any(word.lstrip("+").startswith("convert.repo=") for word in rest)
    command.run(lambda cfg: run(cfg, repo_given), config_name="convert")


def with_keys(name: str, words: list[str]) -> list[str]:
    """The words of a command as overrides: `RUN DIR` as `convert.checkpoint=RUN convert.out=DIR`.

    Args:
        name: of the command.
        words: behind it.

    Raises:
        UserError: there are more words than the command takes.
    """
    # By itself `checkpoint` is a configuration group of training.
    keyed = [f"convert.{word}" if word.startswith("checkpoint=") else word for word in words]
    try:
        return command.name_words(keyed, COMMANDS[name].words)
    except UserError as error:
        raise UserError(f"{error}: python -m posttrain.convert {name} --help") from None


def run(cfg: DictConfig, repo_given: bool = True) -> None:
    """Do what a composed configuration says.

    Args:
        cfg: the configuration.
        repo_given: whether the command line names the repository to push to; a stranger's configuration can't.

    Raises:
        UserError: a key is missing or wrong, or what is to be converted can't be.
    """
    targets.check(cfg)
    c = cfg.convert
    if c.repo is not None and not repo_given:
        raise UserError("`convert.repo`: where to push to is given on the command line, not in a configuration")
    if c.base is not None and "base" not in COMMANDS[c.command].options:
        raise UserError(f"`convert.base={c.base}`: {c.command} has no base to be told; export and merge have")
    if c.command == "push":
        return push_export(c)
    token = None
    if c.push:
        if c.command == "import":
            raise UserError("convert.push=true: goes with export and merge, not with a Megatron checkpoint")
        from posttrain.convert import push  # loads huggingface_hub

        token = push.token_for(c.repo)
    if c.out is None:
        usage = f"python -m posttrain.convert {c.command} {'MODEL' if c.command == 'import' else 'RUN'} DIR"
        raise UserError(f"`convert.out`: has no value; give the directory to write: {usage}")
    if c.dtype not in (None, *DTYPES):
        raise UserError(f"`convert.dtype={c.dtype}`: must be one of {', '.join(DTYPES)}")
    out = Path(os.path.normpath(expand_home(c.out)))
    check_free(out, c.overwrite)
    check_directory(out.parent, "convert.out", out)
    if c.checkpoint is not None:
        check_apart(out, expand_home(c.checkpoint))
    if c.command == "import":
        if OmegaConf.is_missing(cfg.model, "path"):
            raise UserError("`model.path`: has no value; give a Hugging Face directory or a hub id")
        model_checks.check_model(cfg)
        check_apart(out, expand_home(cfg.model.path))
        import_(cfg, out)
    elif c.checkpoint is None:
        raise UserError("`checkpoint`: has no value; give a run directory, or one of its checkpoints")
    elif c.command == "export":
        export(cfg, out)
    else:
        working.phase("importing")
        from posttrain.convert import card, merge

        adapter = merge.find_adapter(expand_home(c.checkpoint))
        base = merge.merge_adapter(adapter, out, c.overwrite, c.dtype, c.license, c.base)
        print(f"merged: {card.with_step(adapter)} into {public_name(str(base))}")
    print(f"written: {out}")
    if token:
        push.check_pushable(out, c.allow_unverified)
        working.phase("pushing")
        print(f"pushed: {push.upload(out, c.repo, token, c.private)}")


def push_export(c: DictConfig) -> None:
    """Put a finished export on a model hub.

    Raises:
        UserError: no repository, no token, nothing to push, or nothing that should be.
    """
    from posttrain.convert import card, push  # load huggingface_hub

    if c.checkpoint is None:
        raise UserError("`checkpoint`: has no value; give a run directory, or an export")
    path = expand_home(c.checkpoint)
    token = push.token_for(c.repo)
    directory = load.export_of(path)
    if directory is None:
        raise UserError(f"checkpoint={path}: holds no finished export; make one: python -m posttrain.convert export")
    load.check_export(directory)
    push.check_pushable(directory, c.allow_unverified)
    address = push.upload(directory, c.repo, token, c.private)
    print(f"pushed: {card.with_step(directory)} to {address}")


def import_(cfg: DictConfig, out: Path) -> None:
    """Check the Hugging Face directory, then start Megatron and convert."""
    model = built(cfg.model)
    if model.adapter is not None:
        raise UserError(
            f"`model.path={model.path}`: is an adapter, and import takes whole models; merge it first: "
            f"python -m posttrain.convert merge {quote(model.path)} DIR"
        )
    check_apart(out, model.directory)  # which is checked before Megatron's long import
    working.phase("importing")
    with quiet():
        single_process.start()
        from posttrain.convert.megatron import import_model

        import_model(model, out, cfg.convert.overwrite, cfg.convert.dtype)


def export(cfg: DictConfig, out: Path) -> None:
    """Find the checkpoint, then start Megatron and convert."""
    c = cfg.convert
    given = expand_home(c.checkpoint)
    checkpoint = find(given, c.base)
    for read in (checkpoint.directory, expand_home(checkpoint.model.path), expand_home(checkpoint.model.base)):
        check_apart(out, read)
    if checkpoint.peft and c.dtype:
        raise UserError(f"`convert.dtype={c.dtype}`: {checkpoint.directory} is an adapter's; give it to merge")
    working.phase("importing")
    with quiet():
        single_process.start()
        from posttrain.convert.megatron import export_checkpoint

        export_checkpoint(checkpoint, out, c.overwrite, c.verify, c.dtype, c.license)
    print(f"exported: {with_step(checkpoint.directory, given)}")


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
