"""The examples of a format and a template in docs/, as a user adds them: a config folder, a module on the path."""

import json
import sys
from pathlib import Path

import pytest

from posttrain import preview
from posttrain.cli.command import compose
from posttrain.errors import UserError

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "data"))
from tiny_tokenizer import byte_tokenizer

EXAMPLES = Path(__file__).resolve().parents[2] / "docs" / "examples"

TICKETS = [
    {"subject": "No sound", "posts": [
        {"by": "ann", "staff": False, "text": "It is silent."}, {"by": "ann", "staff": False, "text": "Help!"},
        {"by": "joe", "staff": True, "text": "Turn it up."}, {"by": "ann", "staff": False, "text": "Thanks"},
        {"by": "joe", "staff": True, "text": "Welcome"}]},
]  # fmt: skip


@pytest.fixture
def shown(tmp_path, monkeypatch):
    """Preview some rows with more words; returns what was written."""
    monkeypatch.setenv("POSTTRAIN_ALLOW_TARGETS", "ticket_format")
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(EXAMPLES)
    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")

    def call(rows, *words):
        data, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        words = [f"hydra.searchpath=[file://{EXAMPLES}/conf]", "model=hf", f"model.path={tmp_path / 'tokenizer'}",
                 f"data.path={data}", f"preview.out={out}", *words]  # fmt: skip
        preview.show_data(compose(words, "preview"))
        return [json.loads(line) for line in out.read_text().splitlines()]

    return call


def trained(row) -> str:
    """The text that is trained."""
    ids = [token for token, mask in zip(row["input_ids"], row["loss_mask"], strict=True) if mask]
    return byte_tokenizer().decode(ids)


def test_format_and_template(shown):
    (row,) = shown(TICKETS, "data=tickets", "data.format.signature=true", "template=vicuna")
    end = byte_tokenizer().eos_token
    assert row["text"] == (
        f"Support ticket: No sound USER: It is silent.\n\nHelp! ASSISTANT: Turn it up.\n\njoe{end}"
        f"USER: Thanks ASSISTANT: Welcome\n\njoe{end}"
    )
    assert trained(row) == f"Turn it up.\n\njoe{end}Welcome\n\njoe{end}"


def test_what_the_format_refuses(shown):
    rows = [*TICKETS, {"subject": "Lost", "posts": [{"by": "ann", "staff": False, "text": "?"}]}]
    with pytest.raises(UserError, match=r"rows.jsonl.*nobody of the staff answered"):
        shown(rows, "data=tickets", "template=vicuna")
    assert len(shown(rows, "data=tickets", "template=vicuna", "data.on_error=skip")) == 1


def test_none_is_longer_than_a_page():
    files = [path for path in EXAMPLES.rglob("*") if path.suffix in (".py", ".yaml")]
    assert len(files) >= 7
    assert {path.name: lines for path in files if (lines := len(path.read_text().splitlines())) >= 60} == {}
