"""The options of the YAML files of conf/, with the comments that explain them."""

import re
from dataclasses import dataclass, replace
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


@dataclass(frozen=True)
class GroupOption:
    """A key of a config group.

    Attributes:
        option: with the key's whole path; default and comment of the first file that explains it.
        choices: of the group, whose files have the key.
    """

    option: Option
    choices: tuple[str, ...]


def sections(conf: Path) -> list[str]:
    """The keys of conf/config.yaml, and the parts in it, that are no group."""
    parts = (option.key.partition(".")[0] for option in read(conf / "config.yaml"))
    return [part for part in dict.fromkeys(parts) if part != "hydra"]


def group_of(conf: Path, key: str) -> str | None:
    """The group or section that a key is in: of `trainer.epochs` it is trainer; None: there is none."""
    parts = key.replace("/", ".").split(".")
    if parts[:2] == ["hydra", "launcher"]:
        return "hydra/launcher"
    is_group = parts[0] != "hydra" and any((conf / parts[0]).glob("*.yaml"))
    return parts[0] if is_group or parts[0] in sections(conf) else None


def default_choice(conf: Path, group: str) -> str | None:
    """What conf/config.yaml chooses of a group, or a command's file there; None: nothing."""
    for path in [conf / "config.yaml", *conf.glob("*.yaml")]:
        chosen = re.search(rf"^  - (?:override )?{group}: (\S+)", path.read_text(encoding="utf-8"), re.MULTILINE)
        if chosen:
            return None if chosen[1] == "null" else chosen[1].strip("[]")
    return None


def of_group(conf: Path, group: str) -> list[GroupOption]:
    """Every key that the files of a group set, those of other groups too, or that a section of conf/config.yaml has.

    Files that several choices include come first, then the default choice: their comments are the group's.
    """
    folder = conf / group
    if not folder.is_dir():
        own = [option for option in read(conf / "config.yaml") if option.key.partition(".")[0] == group]
        return [GroupOption(option, ()) for option in own]
    default = default_choice(conf, group)
    choices = sorted(folder.glob("*.yaml"), key=lambda path: (path.stem != default, path))
    of_files: dict[Path, list[str]] = {}  # the choices that a file is part of
    for choice in choices:
        for path in included(choice):
            of_files.setdefault(path, []).append(choice.stem)
    found: dict[str, GroupOption] = {}
    for path, names in sorted(of_files.items(), key=lambda item: item[0].parent == folder):  # shared ones first
        for option in _of_file(path, group.replace("/", ".")):
            known = found.get(option.key, GroupOption(option, ()))
            if not known.option.comment:
                known = replace(known, option=replace(known.option, comment=option.comment))
            found[option.key] = replace(known, choices=tuple(dict.fromkeys([*known.choices, *names])))
    return list(found.values())


def of_choice(conf: Path, group: str, choice: str) -> list[Option]:
    """The keys of one choice of a group, with its own values."""
    found: dict[str, Option] = {}
    for path in included(conf / group / f"{choice}.yaml"):
        for option in _of_file(path, group.replace("/", ".")):
            comment = option.comment
            if not comment and option.key in found:
                comment = found[option.key].comment
            found[option.key] = replace(option, comment=comment)
    return list(found.values())


def keys(conf: Path) -> set[str]:
    """Every key that a file of conf/ sets for training."""
    found = {option.key for option in read(conf / "config.yaml")}
    for folder in conf.iterdir():
        if folder.is_dir() and folder.name != "model":  # whose keys are those of config.json
            found |= {one.option.key for one in of_group(conf, folder.name)}
    return found


def included(path: Path) -> list[Path]:
    """The files of its folder that a choice is made of, what it includes before itself."""
    text = path.read_text(encoding="utf-8")
    files = []
    for name in re.findall(r"^  - (\w+/\w+)@", text, re.MULTILINE):
        files += included(path.parent / f"{name}.yaml")
    return [*files, path]


def _of_file(path: Path, prefix: str) -> list[Option]:
    """The options of a file of a group by their whole paths."""
    place = package(path) or prefix
    if place == "_global_":
        return read(path)
    return [replace(option, key=f"{place}.{option.key}") for option in read(path)]


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
