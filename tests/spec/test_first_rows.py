"""What the first rows show is said before any process starts, and without torch or Megatron."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from posttrain.config.composition import compose
from posttrain.errors import UserError
from posttrain.models.tokenizer_outline import TokenizerOutline
from posttrain.spec import first_rows

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))
from tiny_tokenizer import CHATML, byte_tokenizer

GOOD = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


@pytest.fixture
def words(tmp_path):
    """The words of a run on a tokenizer's folder and a file of good rows."""
    byte_tokenizer().save_pretrained(tmp_path / "model")
    rows = tmp_path / "rows.jsonl"
    rows.write_text((json.dumps(GOOD) + "\n") * 100)
    return ["model=hf", f"model.path={tmp_path / 'model'}", "data=messages", f"data.path={rows}"]


@pytest.mark.parametrize(
    ("row", "more", "message"),
    [
        ({"text": "x"}, [], "rows.jsonl, line 3: field `messages` is missing; found text; data.format.column says"),
        (
            {"text": "x"},
            ["objective=text", "data.format.column=body"],
            "line 1: field `body` is missing; found messages; data.format.column says which one it is",
        ),
        (
            {"prompt": "x", "reply": "y"},
            ["data=prompt_completion", "data.format.prompt=messages"],
            "line 1: field `completion` is missing; found messages; data.format.completion says which one it is",
        ),
        ({"messages": [{"role": "tool", "content": "x"}, *GOOD["messages"]]}, ["template=llama2"], "line 3: "),
        (GOOD, ["template=llama3"], r"lacks the special tokens <\|start_header_id\|>"),
        (GOOD, ["template=custom", "template.jinja='{{ messages[9].content + 1 }}'"], "never learn to stop|template"),
    ],
)
def test_refused_at_once(words, tmp_path, row, more, message):
    lines = [GOOD, GOOD, row, GOOD]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(UserError, match=message):
        first_rows.look(compose([*words, *more]))


def test_good_rows_are_looked_at_once(words, monkeypatch):
    """A sweep's trials have the same data; and the tokenizer itself is not needed."""
    monkeypatch.setattr(first_rows, "load_tokenizer", None)
    first_rows.look(compose(words))
    monkeypatch.setattr(first_rows, "_first", None)
    first_rows.look(compose([*words, "optimizer.lr=1e-3"]))


def test_skipped_rows_refuse_nothing(words, tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "x"}) + "\n" + json.dumps(GOOD) + "\n")
    first_rows.look(compose([*words, "data.on_error=skip"]))


def test_the_tokenizer_has_the_last_word(words, tmp_path):
    """A tokenizer whose files say less than it does: nothing is refused for that."""
    file = tmp_path / "model" / "tokenizer_config.json"
    config = json.loads(file.read_text())
    assert config.pop("eos_token")
    file.write_text(json.dumps(config))
    (tmp_path / "model" / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    (tmp_path / "my.jinja").write_text("{% for m in messages %}{{ m.content + eos_token }}{% endfor %}")
    first_rows.look(compose([*words, "template=custom", f"template.file={tmp_path / 'my.jinja'}"]))


@pytest.mark.parametrize("template", [CHATML, {"default": CHATML, "tool_use": "{{ tools }}"}, None])
def test_the_outline_has_what_the_tokenizer_has(tmp_path, template):
    tokenizer = byte_tokenizer(chat_template=template, bos="<s>")
    tokenizer.save_pretrained(tmp_path)
    outline = TokenizerOutline(tmp_path)
    if not (tmp_path / "additional_chat_templates").is_dir():
        assert outline.chat_template == tokenizer.chat_template
    assert outline.special_tokens_map == tokenizer.special_tokens_map and outline.eos_token == tokenizer.eos_token
    known = {(token.content, token.special) for token in outline.get_added_tokens_decoder().values()}
    core = tokenizer.backend_tokenizer.get_added_tokens_decoder().values()
    assert known == {(token.content, token.special) for token in core}


def test_the_command_says_it_without_torch(words, tmp_path):
    """Exit code 2, one message, no run directory; of this process's own modules none is torch's or Megatron's."""
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "x"}) + "\n")
    code = (
        "import sys; from posttrain import __main__ as command\n"
        "try: command.main()\n"
        "finally: assert not {'torch', 'megatron', 'transformers'} & set(sys.modules), 'loaded'"
    )
    data = words[2:]  # with the default model
    run = [sys.executable, "-c", code, *data, "launch.prestart=false", f"hydra.run.dir={tmp_path / 'run'}"]
    done = subprocess.run(run, capture_output=True, text=True, cwd=tmp_path, timeout=120, check=False)
    assert done.returncode == 2 and "line 1: field `messages` is missing" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "run").exists()


def test_a_users_own_data_is_left_alone(words):
    cfg = compose(words)
    cfg.data = OmegaConf.create({"_target_": "posttrain.data.formats.Messages"})
    first_rows.look(cfg)
