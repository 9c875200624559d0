"""A stranger's tokenizer that can't be read, fails, or makes endless text: its name and one line, no traceback."""

import base64
import json
import subprocess
import sys

import pytest
from tiny_tokenizer import byte_tokenizer

from posttrain.data.conversation import Conversation, Message
from posttrain.data.encode import Encoder
from posttrain.data.prepare import render
from posttrain.data.render import Renderer
from posttrain.data.templates import ChatTemplate
from posttrain.errors import UserError
from posttrain.models import HFModel
from posttrain.models.tokenizer_files import MAX_GROWTH, failures, growth

CHAT = [Message("user", "hi there " + "a" * 40 + "b"), Message("assistant", "hello")]


@pytest.fixture
def directory(tmp_path):
    """A sound tokenizer's."""
    byte_tokenizer().save_pretrained(tmp_path)
    return tmp_path


def change(directory, **parts):
    """Set parts of tokenizer.json."""
    file = directory / "tokenizer.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **parts}))


def sequence(*normalizers):
    return {"type": "Sequence", "normalizers": list(normalizers)}


def replace(content, **pattern):
    return {"type": "Replace", "pattern": pattern, "content": content}


def split(regex):
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


def table(*entries):
    """A normalizer of SentencePiece's that may put one of `entries` for a character."""
    texts = "".join(entry + "\0" for entry in entries).encode()
    trie = (4).to_bytes(4, "little") + bytes(4)
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(trie + texts).decode()}


def nested(depth):
    part = {"type": "NFC"}
    for _ in range(depth):
        part = sequence(part)
    return part


def tokenized(directory):
    """The ids of a chat, as training makes them."""
    tokenizer = HFModel(path=str(directory)).load_tokenizer()
    renderer = Renderer(ChatTemplate(), tokenizer)
    return Encoder(tokenizer, renderer)([render(Conversation(CHAT), renderer, "assistant")])[0].input_ids


FILES = {
    "deep": '{"normalizer":' + "[" * 100_000 + "]" * 100_000 + "}",
    "another kind": "[]",
    "empty": "{}",
    "half": '{"version": "1.0", "model": {"type": "BPE", "vocab": {"a"',
}


@pytest.mark.parametrize("kind", FILES)
def test_files_that_are_no_tokenizers(kind, directory):
    (directory / "tokenizer.json").write_text(FILES[kind])
    with pytest.raises(UserError, match=rf"^[^\n]*{directory.name}[^\n]*$"):
        tokenized(directory)


BROKEN = {
    "parts nested deeply": {"normalizer": nested(100)},
    "a regular expression that is none": {"pre_tokenizer": split("(a")},
    "one nested deeply": {"pre_tokenizer": split("(" * 30_000 + ")" * 30_000)},
    "one that refers to nothing": {"pre_tokenizer": split(r"\k<x>")},
    "one without end": {"pre_tokenizer": split("(a+)+$")},  # a panic, while it is used
    "a table beyond its end": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "/////2Fi"}},
    "words without one for the unknown": {"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "?"}},
    "pieces without one for the unknown": {"model": {"type": "Unigram", "vocab": [], "unk_id": 5}},
}


@pytest.mark.parametrize("kind", BROKEN)
def test_parts_that_fail(kind, directory):
    """Whatever the library raises, a panic of its Rust code included."""
    change(directory, **BROKEN[kind])
    with pytest.raises(UserError, match=rf"^model\.tokenizer: [^\n]*{directory.name}[^\n]*$"):
        tokenized(directory)


CONFIGS = [{"tokenizer_class": ["x"]}, {"added_tokens_decoder": {"x": 1}}, {"eos_token": {"a": 1}}]


@pytest.mark.parametrize("config", CONFIGS)
def test_configurations_that_fail(config, directory):
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=rf"^model\.tokenizer: [^\n]*{directory.name}[^\n]*$"):
        tokenized(directory)


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
COPIES = [{"Sequence": {"id": "A", "type_id": 0}}] * 1000
ENDLESS = {
    "a letter by a hundred, six times": {"normalizer": sequence(*[replace("a" * 100, String="a")] * 6)},
    "a letter by ten thousand": {"normalizer": replace("a" * 10_000, String="a")},
    "what is between letters": {"normalizer": sequence(*[replace("a" * 9, Regex="")] * 8)},
    "sequences in sequences": {"normalizer": sequence(*[sequence(*[replace("aa", String="a")] * 4)] * 4)},
    "a long prefix": {"normalizer": {"type": "Prepend", "prepend": "a" * 1000}},
    "a table": {"normalizer": table("a", "b" * 1000)},
    "bytes of bytes": {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [BYTES] * 40}},
    "copies": {"post_processor": {"type": "TemplateProcessing", "single": COPIES, "pair": [], "special_tokens": {}}},
    "when it is written": {"decoder": {"type": "Sequence", "decoders": [replace("a" * 100, String="a")] * 6}},
}


@pytest.mark.parametrize("kind", ENDLESS)
def test_parts_that_make_endless_text(kind, directory):
    """Refused before the library reads them: it applies a normalizer to added tokens at once."""
    change(directory, **ENDLESS[kind])
    (part,) = ENDLESS[kind]
    with pytest.raises(UserError, match=rf"tokenizer\.json: its `{part}` can make a text more than {MAX_GROWTH} times"):
        HFModel(path=str(directory)).load_tokenizer()


def test_ids_without_end(directory):
    """The library goes through four thousand million numbers for this one."""
    model = json.loads((directory / "tokenizer.json").read_text())["model"]
    change(directory, model={**model, "vocab": {**model["vocab"], "far": 4_000_000_000}})
    with pytest.raises(UserError, match=r"tokenizer\.json: the id 4000000000 of 'far' is more than 16,777,215"):
        HFModel(path=str(directory)).load_tokenizer()


def test_parts_of_known_tokenizers():
    """Those of Llama 2, Qwen, and the most that there is: ALBERT's."""
    spaces = replace(" ", Regex=" {2,}")
    unicode = [{"type": "NFKD"}, {"type": "StripAccents"}, {"type": "Lowercase"}, table("\u0635" * 18, "a")]
    llama = sequence({"type": "Prepend", "prepend": "\u2581"}, replace("\u2581", String=" "))
    assert growth(llama) == 2
    assert growth({"type": "Sequence", "pretokenizers": [split("a"), BYTES]}) == 2
    assert growth(sequence(replace('"', String="``"), *unicode, spaces)) == 36
    assert growth(None) == 1


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_a_command_that_is_told_to_stop_stops(kind):
    with pytest.raises(kind), failures("tokenizer", "fails"):
        raise kind


def test_a_command_ends_with_exit_code_2(directory):
    change(directory, **BROKEN["one without end"])
    rows = directory / "rows.jsonl"
    rows.write_text(json.dumps({"messages": [{"role": message.role, "content": message.content} for message in CHAT]}))
    words = [
        "model=hf",
        f"model.path={directory}",
        "data=messages",
        f"data.path={rows}",
        f"cache_dir={directory}/cache",
    ]
    command = [sys.executable, "-m", "posttrain.preview", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=directory)
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"posttrain: model.tokenizer: {directory}: the tokenizer fails on a")
    assert "Traceback" not in done.stderr
