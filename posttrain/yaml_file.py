"""YAML from anybody: refused before it is built where it would fill the memory or never end."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from posttrain import rundir
from posttrain.errors import UserError

MOST_NODES = 100_000  # of a document with its aliases written out; a frozen configuration has some 300
DEEPEST = 64


def read(path: Path) -> DictConfig:
    """The configuration in `path`.

    Raises:
        UserError: it can't be read, is no YAML mapping, or see `check`.
    """
    with _readable(path):
        return _built(path.read_text(encoding="utf-8"), path)


def read_in(run_dir: Path, name: str) -> DictConfig:
    """`read` of the file `name` below a run directory, which is no link (rundir.py)."""
    with _readable(run_dir / name):
        return _built(rundir.read_text(run_dir, name), run_dir / name)


def _built(text: str, path: Path) -> DictConfig:
    check(text, path)
    found = OmegaConf.load(io.StringIO(text))
    if not isinstance(found, DictConfig):
        raise UserError(f"{path}: not a configuration: its outermost level must be a mapping")
    return found


def parse(path: Path, loader: Any) -> Any:
    """What is in `path`, of whatever kind.

    Args:
        loader: of PyYAML's, a safe one.

    Raises:
        UserError: it can't be read, is not YAML, or see `check`.
    """
    with _readable(path):
        text = path.read_text(encoding="utf-8")
        check(text, path)
        return yaml.load(text, Loader=loader)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Errors of reading `path` as a user's."""
    try:
        yield
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: can't be read: {error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None


def check(text: str, name: Any) -> None:
    """Look at a document event by event, without building it.

    Aliases are counted as what they stand for: ten anchors of ten aliases each stand for ten thousand million values.

    Args:
        text: the document.
        name: its file, for errors.

    Raises:
        UserError: too large, too deep, or an alias that contains itself.
        yaml.YAMLError: not YAML.
    """
    sizes: dict[str, int] = {}
    stack: list[tuple[str | None, int]] = []  # (anchor, nodes before it) of each collection that is open
    open_anchors: set[str] = set()
    total = 0
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        if isinstance(event, yaml.AliasEvent):
            if event.anchor in open_anchors:
                raise UserError(f"{name}: the alias *{event.anchor} contains itself")
            total += sizes.get(event.anchor, 1)
        elif isinstance(event, yaml.CollectionStartEvent):
            stack.append((event.anchor, total))
            open_anchors |= {event.anchor} - {None}
            total += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = stack.pop()
            if anchor is not None:
                sizes[anchor] = total - before
                open_anchors.discard(anchor)
        elif isinstance(event, yaml.ScalarEvent):
            total += 1
            if event.anchor is not None:
                sizes[event.anchor] = 1
        if len(stack) > DEEPEST:
            raise UserError(f"{name}: nested more than {DEEPEST} levels deep")
        if total > MOST_NODES:
            raise UserError(f"{name}: more than {MOST_NODES} values, aliases written out; not a configuration")
