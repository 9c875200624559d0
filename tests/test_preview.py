"""The preview shows, writes and counts what training would be trained on."""

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch  # noqa: F401  (before the preview keeps it from being imported, for the sake of later tests)

from posttrain import preview
from posttrain.config.composition import compose
from posttrain.errors import UserError

sys.path.insert(0, str(Path(__file__).parent / "data"))
from tiny_tokenizer import byte_tokenizer

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
ROWS = [
    {"instruction": "say hello", "input": "", "output": "hello <b>wörld</b> 🎉"},
    {"instruction": "x", "input": "y", "output": "<|im_end|>\x1b[31m"},
    {"instruction": "nothing", "output": ""},
]


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """The words of a command over a tokenizer-only folder and three rows."""
    folder = tmp_path_factory.mktemp("preview")
    byte_tokenizer().save_pretrained(folder / "tokenizer")
    (folder / "rows.json").write_text(json.dumps(ROWS))
    return [
        "model=hf",
        f"model.path={folder / 'tokenizer'}",
        "data=alpaca",
        f"data.path={folder / 'rows.json'}",
        f"cache_dir={folder / 'cache'}",
        "trainer.seq_length=256",
    ]


def run(words, *more):
    preview.show_data(compose([*words, *more], config_name="preview"))


def test_terminal(words, capsys):
    run(words, "preview.limit=0")
    out = capsys.readouterr().out
    assert "<|im_start|>assistant\n⟦hello <b>wörld</b> 🎉<|im_end|>⟧" in out
    assert "⟦<|im_end|>\\x1b[31m<|im_end|>⟧" in out and "\x1b[31m" not in out
    assert "\n⟦ ⟧ around what is trained: supervised tokens" in out
    found = dict(re.split(r"  +", line, maxsplit=1) for line in out.splitlines() if re.search(r"\S  +\d", line))
    assert found["rows read"] == "3" and found["kept"] == "2" and found["dropped: nothing to train on"] == "1"
    assert found["epoch"] == "1 step of 1 row" and found["train: sequences"].startswith("1 of 256 tokens, ")


def test_rows_are_those_of_context_parallelism(words, tmp_path, capsys):
    """Which pads each conversation to a multiple of what its processes divide."""
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"instruction": "x", "output": "y" * length} for length in range(1, 129)]))
    rows = {}
    for layout in ("ddp", "cp4"):
        run(words, f"data.path={path}", f"parallelism={layout}", "trainer.seq_length=248")
        rows[layout] = int(re.search(r"train: sequences +(\d+) of 248 tokens", capsys.readouterr().out)[1])
    assert rows["cp4"] > rows["ddp"]
    with pytest.raises(UserError, match=r"trainer\.seq_length=250`: must be a multiple of tensor x 2 x context"):
        run(words, f"data.path={path}", "parallelism=cp4", "trainer.seq_length=250")


def test_out(words, tmp_path, capsys):
    run(words, "preview.limit=0", f"preview.out={tmp_path / 'o.jsonl'}")
    rows = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert [row["row"] for row in rows] == [0, 1]
    tokenizer = byte_tokenizer()
    for row, given in zip(rows, ROWS, strict=False):
        assert len(row["input_ids"]) == len(row["loss_mask"]) and set(row["loss_mask"]) == {0, 1}
        assert tokenizer.decode(row["input_ids"]) == row["text"]
        supervised = [i for i, on in zip(row["input_ids"], row["loss_mask"], strict=True) if on]
        assert tokenizer.decode(supervised) == given["output"] + "<|im_end|>"
    run(words, "preview.limit=1", f"preview.out={tmp_path / 'one.jsonl'}")
    assert len((tmp_path / "one.jsonl").read_text().splitlines()) == 1


def test_out_has_the_split_of_each_row(words, tmp_path, capsys):
    """And no row that is in none: what data.max_train_rows leaves out is not trained."""
    path = tmp_path / "many.jsonl"
    path.write_text("".join(json.dumps({"instruction": f"q{i}", "output": f"a{i}"}) + "\n" for i in range(20)))
    out = tmp_path / "o.jsonl"
    many = (f"data.path={path}", "preview.limit=0", f"preview.out={out}")
    run(words, *many, "data.validation_fraction=0.2", "data.max_train_rows=5")
    splits = [json.loads(line)["split"] for line in out.read_text().splitlines()]
    assert (splits.count("train"), splits.count("validation"), len(splits)) == (5, 4, 9)
    run(words, *many, "data.max_train_rows=7")
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["row"], row["split"]) for row in rows] == [(number, "train") for number in range(7)]


def test_a_template_of_ones_own_in_a_file(words, tmp_path, capsys):
    """With a byte order mark, as some editors leave it, which is no part of the text."""
    (tmp_path / "my.jinja").write_text(byte_tokenizer().chat_template, encoding="utf-8-sig")
    run(words, "template=custom", f"template.file={tmp_path / 'my.jinja'}", "preview.limit=1")
    assert "<|im_start|>assistant\n⟦hello" in capsys.readouterr().out


def test_the_report_names_what_is_not_in_the_text(words, tmp_path, capsys):
    path = tmp_path / "moods.jsonl"
    path.write_text(json.dumps({"instruction": "q", "output": "a", "mood": "gloomy"}) + "\n")
    run(words, f"data.path={path}", f"preview.html={tmp_path / 'o.html'}")
    for text in (capsys.readouterr().out, (tmp_path / "o.html").read_text()):
        assert "not in the text: mood" in text
        assert "first not in the text, mood: " in text and "moods.jsonl, line 1: " in text


class Supervised(HTMLParser):
    """The text within elements of class supervised, and of the whole page."""

    def __init__(self, page):
        super().__init__()
        self.stack, self.supervised, self.tags = [], "", set()
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.stack.append("supervised" in (dict(attributes).get("class") or ""))

    def handle_endtag(self, tag):
        self.stack and self.stack.pop()

    def handle_data(self, data):
        if self.stack and self.stack[-1]:
            self.supervised += data


def test_html(words, tmp_path, capsys):
    run(words, f"preview.html={tmp_path / 'o.html'}")
    page = Supervised((tmp_path / "o.html").read_text())
    assert "hello <b>wörld</b> 🎉<|im_end|>" in page.supervised and "say hello" not in page.supervised
    assert not page.tags & {"script", "link", "img", "b"}


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_html_in_a_browser(words, tmp_path, capsys):
    run(words, f"preview.html={tmp_path / 'o.html'}")
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    url = (tmp_path / "o.html").as_uri()
    dom = subprocess.run([*command, "--dump-dom", url], capture_output=True, text=True, timeout=120, check=True).stdout
    assert "hello <b>wörld</b> 🎉<|im_end|>" in Supervised(dom).supervised
    picture = tmp_path / "page.png"
    shot = [*command, f"--screenshot={picture}", "--window-size=800,600", url]
    subprocess.run(shot, capture_output=True, timeout=120, check=True)
    assert picture.stat().st_size > 5000


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["preview.limit=-1"], "preview.limit=-1"),
        (["preview.out=/no/such/folder/x"], "no such folder"),
        (["preview.limt=3"], "preview.limt.*unknown"),
        (["data.path=/no/such/file.json"], "data.path=/no/such/file.json: there is no such"),
        (["template=llama3"], "lacks the special tokens"),
        (["model.path=/no/such/dir"], "model.*no/such/dir"),
    ],
)
def test_mistakes(words, more, message):
    with pytest.raises(UserError, match=message):
        run(words, *more)


def test_the_command_loads_neither_torch_nor_megatron(words, tmp_path):
    code = (
        "import sys; from posttrain import preview; sys.argv = ['preview', *sys.argv[1:]]; preview.main();"
        "assert not {'torch', 'megatron', 'datasets'} & set(sys.modules), 'loaded'"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=tmp_path, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if not re.fullmatch(r"posttrain: .* \d+ s", line)]  # what it does
    assert "\nepoch " in done.stdout and not said and not list(tmp_path.iterdir())
