"""YAML from anybody: refused before it is built where it would fill the memory or never end."""

import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from posttrain.errors import UserError
from posttrain.utils import rundir
from posttrain.utils.atomic_files import read_text

# What JSON has too. The others of YAML's types (dates, sets, bytes) are no part of a configuration.
TYPES = ("null", "bool", "int", "float", "str", "seq", "map")
MOST_BITS = 1023  # of a whole number: more don't fit a float, and Python refuses to write thousands of digits
MOST_NODES = 100_000  # of a document with its aliases written out; a frozen configuration has some 300
DEEPEST = 64
WHOLE = re.compile(r"[-+]?[0-9][0-9a-fA-FxX_:]{320}")  # of more digits than any float has
MOST_INTERPOLATIONS = 32  # in a text; OmegaConf takes a millisecond for each, and nests them as deep


def _plain_resolvers() -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    """What PyYAML takes a scalar for by its first character, dates aside: they are text, as for OmegaConf."""
    resolvers = {}
    for first, choices in yaml.SafeLoader.yaml_implicit_resolvers.items():
        resolvers[first] = [choice for choice in choices if not choice[0].endswith(":timestamp")]
    return resolvers


def _plain_constructors() -> dict[str | None, Callable[..., object]]:
    """How PyYAML builds what JSON has too; the constructor without a tag refuses all others."""
    constructors = {}
    for tag, build in yaml.SafeLoader.yaml_constructors.items():
        if tag is None or tag.rpartition(":")[2] in TYPES:
            constructors[tag] = build
    return constructors


class Plain(yaml.CSafeLoader):
    """A safe loader of plain values."""

    yaml_implicit_resolvers = _plain_resolvers()
    yaml_constructors = _plain_constructors()

    def construct_whole(self, node: yaml.ScalarNode) -> int:
        """As PyYAML's, within `MOST_BITS`."""
        value: int = self.construct_yaml_int(node)
        if value.bit_length() > MOST_BITS:
            raise yaml.constructor.ConstructorError(None, None, "a whole number beyond every float", node.start_mark)
        return value


Plain.add_constructor("tag:yaml.org,2002:int", Plain.construct_whole)


def read(path: Path) -> DictConfig:
    """The configuration in `path`.

    Raises:
        UserError: it can't be read, is not a YAML mapping, or see `check`.
    """
    with _readable(path):
        return _built(read_text(path), path)


def read_in(run_dir: Path, name: str) -> DictConfig:
    """`read` of the file `name` below a run directory, which must not be a link (rundir.py)."""
    with _readable(run_dir / name):
        return _built(rundir.read_text(run_dir, name), run_dir / name)


def _built(text: str, path: Path) -> DictConfig:
    check(text, path)
    cfg = OmegaConf.load(io.StringIO(text))
    if not isinstance(cfg, DictConfig):
        raise UserError(f"{path}: not a configuration: its outermost level must be a mapping")
    return cfg


def parse(path: Path, loader: type[Plain] = Plain) -> Any:
    """What is in `path`, of whatever kind; raises as `parse_text`, also where it can't be read."""
    with _readable(path):
        return parse_text(read_text(path), path, loader)


def parse_text(text: str, name: object, loader: type[Plain] = Plain) -> Any:
    """The value of a document, of whatever kind.

    Args:
        text: the document.
        name: its file, for errors.
        loader: says what scalars mean.

    Raises:
        UserError: it is not YAML, or see `check`.
    """
    with _readable(name):
        check(text, name)
        return yaml.load(text, Loader=loader)


def repetitions(path: Path) -> list[tuple[str, str]]:
    """(dotted key, text of its value) of each key that the same mapping has again with another value; the last counts.

    Of a value that is a list or a mapping the kind is given.

    Raises:
        UserError: see `parse_text`.
    """
    with _readable(path):
        text = read_text(path)
        check(text, path)
        return list(_repetitions(yaml.compose(text, Loader=yaml.CSafeLoader), "", set()))


def _repetitions(node: yaml.Node | None, where: str, seen: set[int]) -> Iterator[tuple[str, str]]:
    if not isinstance(node, yaml.MappingNode) or id(node) in seen:
        return
    seen.add(id(node))  # an alias is the same node
    last = {key.value: value for key, value in node.value if isinstance(key, yaml.ScalarNode)}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            continue
        name = f"{where}.{key.value}" if where else key.value
        if last[key.value] is value:
            yield from _repetitions(value, name, seen)
        elif not isinstance(value, yaml.ScalarNode):
            yield name, value.id
        elif last[key.value].value != value.value:
            yield name, value.value


@contextmanager
def _readable(path: object) -> Iterator[None]:
    """Errors of reading `path` as a user's."""
    try:
        yield
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: can't be read: {error}") from None
    except (yaml.YAMLError, ValueError) as error:  # of a value: a number of thousands of digits
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None


def check(text: str, name: object) -> None:
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
    for event in yaml.parse(text, Loader=yaml.CSafeLoader):
        if isinstance(event, yaml.AliasEvent):
            if event.anchor in open_anchors:
                raise UserError(f"{name}: the alias *{event.anchor} contains itself")
            total += sizes.get(event.anchor, 1)
        elif isinstance(event, yaml.CollectionStartEvent):
            stack.append((event.anchor, total))
            if event.anchor is not None:
                open_anchors.add(event.anchor)
            total += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = stack.pop()
            if anchor is not None:
                sizes[anchor] = total - before
                open_anchors.discard(anchor)
        elif isinstance(event, yaml.ScalarEvent):
            total += 1
            if event.implicit[0] and WHOLE.match(event.value):
                raise UserError(f"{name}: a whole number of hundreds of digits")
            if event.value.count("${") > MOST_INTERPOLATIONS:
                raise UserError(f"{name}: a text with more than {MOST_INTERPOLATIONS} interpolations")
            if event.anchor is not None:
                sizes[event.anchor] = 1
        if len(stack) > DEEPEST:
            raise UserError(f"{name}: nested more than {DEEPEST} levels deep")
        if total > MOST_NODES:
            raise UserError(f"{name}: more than {MOST_NODES} values, aliases written out; not a configuration")
