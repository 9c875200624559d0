"""From `data.path` to files, and from files to rows."""

import glob
import os
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from posttrain.data import readers, row_filter
from posttrain.data.conversation import Conversation, Document, RowError
from posttrain.data.format_types import FileFormat, Format, RowFormat
from posttrain.data.formats.fields import variables
from posttrain.data.trace import TracedRow, check_row_weight
from posttrain.demo.data import ensure_sentences
from posttrain.errors import UserError
from posttrain.utils import kernel_files
from posttrain.utils.user_paths import expand_home

MOST_FOLDERS = 100_000  # that are searched
DEMO = "demo:sentences"
# A word of a file's or folder's name that says which split it is of, as the Hugging Face hub reads them.
OTHER_SPLIT = re.compile(r"(?<![a-z0-9])(test|testing|valid|validation|val|dev|eval|evaluation)(?![a-z0-9])")
# What `datasets` and the hub write beside a data set: its description, no rows.
DESCRIPTIONS = frozenset({"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"})
TRAIN_SPLIT = re.compile(r"(?<![a-z0-9])(train|training)(?![a-z0-9])")


@dataclass(frozen=True)
class Source:
    """Rows of a configuration, and how they are read.

    Attributes:
        path: a file, folder, pattern, several of these, a data set of the hub, or the demo's.
        form: what their columns mean.
        key: of the configuration, that names the path.
        options: what the files don't say of themselves.
        where: the expression that chooses rows; None: all.
        weight: how many times an epoch goes over them.
    """

    path: str | Sequence[str]
    form: Format
    key: str = "data.path"
    options: readers.FileOptions = readers.PLAIN
    where: str | None = None
    weight: float = 1.0

    @property
    def kinds(self) -> frozenset[str]:
        """Suffixes of the files in a folder that the format reads."""
        return getattr(self.form, "kinds", readers.KNOWN)

    @property
    def on_hub(self) -> bool:
        """Whether the rows are a data set of the Hugging Face hub."""
        return isinstance(self.path, str) and self.path.startswith(readers.HUB)

    def files(self, cache_dir: Path) -> list[Path]:
        """The files that the path means, see `files`."""
        return files(self.path, self.key, cache_dir, self.kinds)


def rows(
    source: Source, cache_dir: Path, category: str | None = None
) -> Iterator[tuple[readers.Place, Conversation | Document | RowError]]:
    """Stream what a source's format reads, conversations or documents; the broken ones as their error.

    Args:
        source: where the rows are, and how they are read.
        cache_dir: where the demo data is put.
        category: the column that names a row's category, kept in its place; None: there is none.

    Raises:
        UserError: a file can't be read.
    """
    read = raw_rows(source, cache_dir)
    if source.where is not None:
        read = row_filter.chosen(read, source.where)
    if category is not None:
        read = _labelled(read, category)
    if isinstance(source.form, FileFormat):
        yield from source.form.read(read)
    else:
        yield from _row_by_row(read, source.form)


def raw_rows(source: Source, cache_dir: Path) -> Iterator[readers.Row]:
    """Stream all rows of a source as they are in its files.

    Raises:
        UserError: a file can't be read.
    """
    if isinstance(source.path, str) and source.on_hub:
        from posttrain.data import hub_datasets  # loads `huggingface_hub`

        yield from hub_datasets.rows(source.path)
        return
    for file in source.files(cache_dir):
        yield from readers.read(file, source.kinds, source.options)


def _row_by_row(
    rows: Iterable[readers.Row], form: RowFormat
) -> Iterator[tuple[readers.Place, Conversation | RowError]]:
    metadata = frozenset(getattr(form, "metadata", ()))
    for place, row in rows:
        try:
            if isinstance(row, RowError):
                raise row
            conversations = _of_row(TracedRow(row), form, place, metadata)
        except RowError as error:
            yield place, error
            continue
        for conversation in conversations:
            yield place, conversation


def _of_row(row: TracedRow, form: RowFormat, place: readers.Place, metadata: frozenset[str]) -> list[Conversation]:
    """The conversations of one row, each with the row's variables of the template and what the format didn't read.

    Raises:
        RowError: the format can't read it.
    """
    conversations = list(form.conversations(row))
    own = variables(row)
    unread = row.unread(metadata)
    if unread:
        check_row_weight(row, unread)
    for conversation in conversations:
        if own:
            conversation.variables = own
        if unread:
            conversation.unread = {**unread, **conversation.unread}
        if len(conversations) > 1:
            conversation.tree = place.digest()
    return conversations


def _labelled(rows: Iterable[readers.Row], column: str) -> Iterator[readers.Row]:
    for place, row in rows:
        if isinstance(row, dict) and isinstance(row.get(column), str | int | float):
            place = replace(place, category=str(row[column]))
        yield place, row


def files(path: str | Sequence[str], key: str, cache_dir: Path, kinds: Collection[str] = readers.KNOWN) -> list[Path]:
    """The files that `path` means: a file, a folder (searched below), a glob, several of these, or the demo's.

    Args:
        path: as the user wrote it.
        key: the configuration key, for errors.
        cache_dir: where the demo data is put.
        kinds: suffixes of the files that are taken from a folder.

    Raises:
        UserError: there is nothing, or nothing readable.
    """
    if not isinstance(path, str):
        several: list[Path] = []
        for one in path:
            several += files(one, key, cache_dir, kinds)
        return several
    if path.startswith("demo:"):
        name = path.removeprefix(DEMO).lstrip("/") or "train"
        if not path.startswith(DEMO) or name not in ("train", "validation"):
            raise UserError(f"{key}={path}: the demo data are {DEMO} and {DEMO}/validation")
        return [ensure_sentences(cache_dir) / f"{name}.jsonl"]
    where = expand_home(path)
    kernel_files.refuse(where, key)
    if where.is_file():
        return [where]
    if where.is_dir():
        found, others = _in_folder(where, key, kinds)
        if not found and others:
            raise UserError(
                f"{key}={path}: this folder has files of other splits alone: {_names(others, where)}; name the files "
                "to train on them"
            )
        if not found:
            hint = ""
            if any(where.rglob("*.arrow")):
                hint = f"; *.arrow is {readers.ELSEWHERE['.arrow']}"
            raise UserError(f"{key}={path}: no {', '.join(sorted(kinds))} file in this folder{hint}")
    else:
        found = [file for file in set(_matches(where, f"{key}={path}")) if file.is_file()]
        if not found:
            hint = f"; a data set of the Hugging Face hub is named {readers.HUB}{path}" if path.count("/") == 1 else ""
            folder = "" if where.is_absolute() else f" below {Path.cwd()}"
            raise UserError(f"{key}={path}: there is no such file, folder or pattern{folder}{hint}")
    for file in found:
        kernel_files.refuse(file, key)
    return sorted(found)


def left_out(source: Source) -> list[str]:
    """Return what to tell of files that `files` leaves out of folders, by their names those of another split."""
    notes = []
    for one in [source.path] if isinstance(source.path, str) else source.path:
        where = expand_home(one)
        if where.is_dir():
            others = _in_folder(where, source.key, source.kinds)[1]
            if others:
                names = _names(others, where)
                notes.append(f"{source.key}={one}: left out as files of another split: {names}; name them to take them")
    return notes


def _in_folder(where: Path, key: str, kinds: Collection[str]) -> tuple[list[Path], list[Path]]:
    """The files in a folder, hidden ones left out: those to take, and for training those of other splits."""
    found = []
    others = []
    for folder, names in _walk(where, f"{key}={where}", links=False):
        for name in names:
            file = folder / name
            if name.startswith(".") or name in DESCRIPTIONS or not file.is_file() or not _known(file, kinds):
                continue
            inside = str(file.relative_to(where)).lower()
            if key == "data.path" and OTHER_SPLIT.search(inside) and not TRAIN_SPLIT.search(inside):
                others.append(file)
            else:
                found.append(file)
    return found, sorted(others)


def _names(files: list[Path], root: Path) -> str:
    """The first of some files, as seen from a folder."""
    names = [str(file.relative_to(root)) for file in files[:5]]
    if len(files) > len(names):
        names.append(f"... ({len(files)} in all)")
    return ", ".join(names)


def _matches(pattern: Path, key: str) -> Iterator[Path]:
    """What a pattern means; `**` stands for any folders, each of them looked into once whatever links lead there.

    Raises:
        UserError: it has more than one `**`.
    """
    parts = pattern.parts
    if parts.count("**") > 1:
        raise UserError(f"{key}: has more than one **, each of which searches all that the other finds")
    if "**" not in parts:
        yield from map(Path, glob.glob(str(pattern)))
        return
    at = parts.index("**")
    inside = str(Path(*parts[at + 1 :])) if parts[at + 1 :] else "*"
    for root in glob.glob(str(Path(*parts[:at]))) if at else ["."]:
        for folder, _ in _walk(Path(root), key, links=True):
            for name in glob.glob(inside, root_dir=folder):
                yield folder / name


def _walk(root: Path, key: str, links: bool) -> Iterator[tuple[Path, list[str]]]:
    """Yield each folder at or below `root` with the names of its files.

    Args:
        root: a folder.
        key: the configuration key and its value, for the error.
        links: whether to follow links to folders, as patterns do. Hidden folders are left out.

    Raises:
        UserError: there are more than MOST_FOLDERS.
    """
    seen: set[tuple[int, int]] = set()
    for folder, inner, names in os.walk(root, followlinks=links):
        found = os.stat(folder)
        if (found.st_dev, found.st_ino) in seen:
            inner.clear()
            continue
        seen.add((found.st_dev, found.st_ino))
        if len(seen) > MOST_FOLDERS:
            raise UserError(f"{key}: has more than {MOST_FOLDERS:,} folders below it; name a folder nearer to the data")
        inner[:] = [name for name in inner if not name.startswith(".")]
        yield Path(folder), names


def _known(file: Path, kinds: Collection[str]) -> bool:
    return file.name.lower().endswith(tuple(kinds))


def detected(files: Sequence[Path], source: Source) -> list[str]:
    """Return what to tell of how a source's files are read where nothing says it; the first of them stands for all."""
    found = readers.detected(files[0], source.options) if files else []
    if not found:
        return []
    return [f"{files[0].name}: read as {' and '.join(found)}, as its beginning says"]
