"""The files of a tokenizer, which may come from a stranger: what is read and copied of them, and how that can fail."""

import base64
import binascii
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from posttrain.errors import UserError
from posttrain.models.headers import own_file, read_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer

type Json = dict[str, "Json"] | list["Json"] | str | float | bool | None

# Every file that a fast tokenizer is made of.
FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "chat_template.json",
)
TEMPLATES = "additional_chat_templates"
MAX_GROWTH = 100  # times; SentencePiece's table of Unicode makes 18 characters of one, and no tokenizer known 40
MAX_ID = (1 << 24) - 1  # of a token: the library goes through all numbers up to the largest, given to a token or not
# The parts of tokenizer.json that change the text itself, and the keys under which a part holds others.
PARTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
SEQUENCES = ("normalizers", "pretokenizers", "processors", "decoders")


def check_files(directory: Path) -> None:
    """See that the files of a model directory besides its weights are its own.

    Raises:
        UserError: one of them is a link that leads elsewhere, is no regular file, or is too large.
    """
    for name in (*FILES, "config.json", "generation_config.json"):
        own_file(directory / name)
    own_file(directory / TEMPLATES, folder=True)
    for file in (directory / TEMPLATES).glob("*.jinja"):
        own_file(file)


def check_spec(directory: Path) -> None:
    """See that tokenizer.json, where there is one, makes no endless text out of a short one, nor an endless vocabulary.

    Raises:
        UserError: a part of it can make a text more than MAX_GROWTH times as long, a token has an id beyond MAX_ID, or
            it is not valid JSON.
    """
    file = directory / "tokenizer.json"
    if not file.is_file():
        return
    spec = read_json(file)
    _check_parts(spec, file)
    model = spec.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, dict):
        for token, number in vocabulary.items():
            if isinstance(number, int) and number > MAX_ID:
                raise UserError(f"model.tokenizer: {file}: the id {number} of {token!r} is more than {MAX_ID:,}")


def check_loaded(tokenizer: "Tokenizer", directory: Path) -> None:
    """See the same of the text's growth for a tokenizer read from `directory`, whichever of its files it was made of.

    Raises:
        UserError: a part of it can make a text more than MAX_GROWTH times as long.
    """
    parts: dict[str, Json] = {}
    for name in PARTS:
        part = getattr(tokenizer, name)
        if part is not None:
            parts[name] = json.loads(part.__getstate__())
    _check_parts(parts, directory)


def _check_parts(spec: dict[str, Json], path: Path) -> None:
    for name in PARTS:
        if growth(spec.get(name)) > MAX_GROWTH:
            raise UserError(
                f"model.tokenizer: {path}: its `{name}` can make a text more than {MAX_GROWTH} times as long; "
                "no tokenizer for training does"
            )


def growth(part: Json) -> float:
    """How many times as long a part of tokenizer.json can make a text, at most.

    Unicode's own forms count as 1: they lengthen a text a few times, and no more when they are repeated.
    """
    if not isinstance(part, dict):
        return 1.0
    most = _own_growth(part)
    for key in SEQUENCES:
        inner = part.get(key)
        if isinstance(inner, list):
            for each in inner:
                most = min(most * growth(each), 1e300)  # not infinite: 0 times it would be no number
    return most


def _own_growth(part: dict[str, Json]) -> float:
    kind = part.get("type")
    if kind == "Replace":
        return _replacement_growth(part.get("pattern"), str(part.get("content")))
    if kind == "Prepend":
        return 1.0 + len(str(part.get("prepend")))  # of a text of one character
    if kind in ("Metaspace", "ByteLevel"):
        return 2.0  # a mark before each word; two characters for a byte beyond ASCII
    if kind == "TemplateProcessing":
        single = part.get("single")
        if not isinstance(single, list):
            return 1.0
        texts = [piece for piece in single if isinstance(piece, dict) and "Sequence" in piece]
        return max(1.0, len(texts))
    if kind == "Precompiled":
        return _longest_entry(str(part.get("precompiled_charsmap")))
    return 1.0


def _replacement_growth(pattern: Json, content: str) -> float:
    literal = pattern.get("String") if isinstance(pattern, dict) else None
    if isinstance(literal, str) and literal:
        return max(1.0, len(content) / len(literal))
    return 1.0 + len(content)  # a regular expression may match nothing, between any two characters


def _longest_entry(table: str) -> float:
    """Of SentencePiece's table: a trie, its length in four bytes before it, then what is put for a character."""
    try:
        data = base64.b64decode(table)
    except (binascii.Error, ValueError):
        return 1.0  # the library refuses it, too
    texts = data[4 + int.from_bytes(data[:4], "little") :].decode("utf-8", "replace")
    return float(max(map(len, texts.split("\0"))))


@contextmanager
def failures(path: str | Path, failure: str) -> Iterator[None]:
    """Around the tokenizer library's work with a stranger's files, which can fail in any way.

    A panic of its Rust code is no Exception for Python, but derives from BaseException alone.

    Args:
        path: where the tokenizer comes from.
        failure: what has failed then, such as "no tokenizer can be read".

    Raises:
        UserError: whatever the library raises, on one line.
    """
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise  # the command is told to stop
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"model.tokenizer: {path}: {failure}: {reason or type(error).__name__}") from error
