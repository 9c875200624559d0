"""The options of a YAML file of conf/, with the comments that explain them."""

from dataclasses import dataclass
from pathlib import Path

import yaml


@dataclass(frozen=True)
class Option:
    """One key.

    Attributes:
        key: its path, `a.b`.
        default: its value as written in the file; of text over several lines the first one.
        comment: what the file says about it: the lines above, or behind it; else what it says about the key before.
    """

    key: str
    default: str
    comment: str


def header(path: Path) -> str:
    """The comment on top of a file: what it is for."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# @package"):
            lines.append(line[1:].strip())
    return " ".join(lines)


def package(path: Path) -> str | None:
    """Where a file's keys go (`# @package _global_`); None: under their group."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("# @package "):
            return line.split()[2]
    return None


def read(path: Path) -> list[Option]:
    """Every option of a file, inner ones by their path; Hydra's `defaults` and `_target_` are none."""
    text = path.read_text(encoding="utf-8")
    root = yaml.compose(text)
    if not root:
        return []
    return _options(root, text.splitlines(), "")


def _options(mapping: yaml.MappingNode, lines: list[str], prefix: str) -> list[Option]:
    found: list[Option] = []
    above = ""  # the comment over the last key, which the keys right below it share
    for key, value in mapping.value:
        comment = _above(lines, key.start_mark.line, key.start_mark.column)
        behind = _behind(lines, key, value)
        shared = ""
        if _follows(lines, key):
            shared = above
        above = comment
        if not comment and not behind:
            above = shared
        if key.value in ("defaults", "_target_", "_partial_"):
            continue
        path = f"{prefix}{key.value}"
        if isinstance(value, yaml.MappingNode) and value.value and not value.flow_style:
            if comment or behind:
                found.append(Option(path, "", comment or behind))
            found += _options(value, lines, f"{path}.")
        else:
            found.append(Option(path, _written(value), comment or behind or shared))
    return found


def _above(lines: list[str], line: int, column: int) -> str:
    """The comment lines directly above a key, in its column; those on top of the file are its header."""
    start = line
    while start and lines[start - 1].startswith(" " * column + "#"):
        start -= 1
    if start == 0:
        return ""
    return " ".join(map(_uncommented, lines[start:line]))


def _behind(lines: list[str], key: yaml.Node, value: yaml.Node) -> str:
    """The comment on a key's line, and the lines below it that go on in the same column."""
    block = isinstance(value, yaml.CollectionNode) and not value.flow_style
    mark = value.end_mark
    if block or _is_long_text(value):
        mark = key.end_mark
    rest = lines[mark.line][mark.column :]
    at = rest.find(" #")
    if at < 0:
        return ""
    words, column = [rest[at + 2 :].strip()], mark.column + at + 1
    for text in lines[mark.line + 1 :]:
        if text.strip().startswith("#") and text.index("#") == column:
            words.append(_uncommented(text))
        else:
            break
    return " ".join(words)


def _follows(lines: list[str], key: yaml.Node) -> bool:
    """Whether a key stands right below another line of YAML."""
    if key.start_mark.line == 0:
        return False
    before = lines[key.start_mark.line - 1].strip()
    return bool(before) and not before.startswith("#")


def _uncommented(line: str) -> str:
    """The text of a line that is a comment."""
    return line.strip().lstrip("#").strip()


def _is_long_text(value: yaml.Node) -> bool:
    """Whether it is a text over several lines, behind `|` or `>`."""
    return getattr(value, "style", None) in ("|", ">")


def _written(value: yaml.Node) -> str:
    if _is_long_text(value):
        return value.value.strip().splitlines()[0] + " ..."
    text = value.start_mark.buffer[value.start_mark.pointer : value.end_mark.pointer]
    return " ".join(text.split()) or "null"
