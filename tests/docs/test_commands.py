"""Every command that is shown (README, docs/, comments in conf/, docstrings) composes and reads its data."""

import csv
import gzip
import importlib
import importlib.util
import json
import re
import shlex
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hydra.errors import HydraException

from posttrain import preview
from posttrain.cli import command, help_screen, subcommands
from posttrain.cli.precheck import trials
from posttrain.config.composition import CONF_DIR, PACKAGE
from posttrain.config.overrides import quote_expressions
from posttrain.errors import UserError
from posttrain.spec import checks

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "data"))
from tiny_tokenizer import CHATML, byte_tokenizer

ROOT = Path(__file__).resolve().parents[2]

SHOWN = re.compile(r"python -m (posttrain(?:\.\w+)*)((?: [^`\n]*)?)")
NAMES = "|".join([*subcommands.ALIASES, *subcommands.files(PACKAGE)])
AS_SCRIPT = re.compile(rf"(?<=[ `/])posttrain ({NAMES})(?= |`|$)", re.MULTILINE)
LAYOUT = re.compile(r"`(?:parallelism=)?((?:[tpce]p\d+)(?:_[tpce]p\d+)*)`")
EXAMPLE = re.compile(r"(?:Example|Your own): (.*)")
DATA_COMMANDS = {"posttrain": "config", "posttrain.preview": "preview", "posttrain.plan": "plan"}
CONFIGS = {**DATA_COMMANDS, "posttrain.evaluate": "evaluate", "posttrain.convert": "convert"}
NOT_COMPOSED = ("hydra", "hydra/launcher", "hydra/sweeper", "recipe")  # tests of their own: sweep, recipes
MISTAKES = ("peft.rnak", "bf61", "learning_rate=2e-5", "data.path=qa.csv")  # shown with what they are answered
STANDING = {"DIR_OR_HUB_ID": "owner/name", "DIR_WITH_A_TOKENIZER": "tokenizer", "DIR": "tokenizer", "ADAPTER_DIR": ""}
GPUS = 8

MESSAGES = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
ROWS = {
    "alpaca": {"instruction": "a", "output": "b"},
    "dolly": {"instruction": "a", "response": "b"},
    "sharegpt": {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    "messages": {"messages": MESSAGES},
    "oasst": {"prompt": {"role": "prompter", "text": "a", "replies": [{"role": "assistant", "text": "b"}]}},
    "prompt_completion": {"prompt": "a", "completion": "b", "question": "a", "answer": "b", "reply": "b"},
    "custom": {"title": "t", "question": "a", "reply": "b", "answer": "b"},
    "tickets": {
        "subject": "s",
        "posts": [{"by": "x", "staff": False, "text": "a"}, {"by": "y", "staff": True, "text": "b"}],
    },
    "text": {"text": "a text", "content": "a text"},
}


def texts():
    """(where, text) of everything that shows commands."""
    for path in sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *CONF_DIR.rglob("*.yaml")]):
        yield path, path.read_text(encoding="utf-8")
    yield PACKAGE / "cli" / "help_screen.py", help_screen.HEAD
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path, path.read_text(encoding="utf-8").replace("\\\\\n", "\\\n").partition('"""\n\n')[0]


def commands():
    """{(module, words): where it is shown first}."""
    found = {}
    for path, text in texts():
        text = re.sub(r" *\\\n\s*(?:# )?", " ", text)
        text = AS_SCRIPT.sub(lambda shown: f"python -m {subcommands.module_of(shown[1])}", text)
        for module, words in SHOWN.findall(text):
            found.setdefault((module, words.strip()), path.relative_to(ROOT))
        if path.suffix == ".yaml":
            for examples in EXAMPLE.findall(text):
                for words in re.split(r" , |, or (?=template)", examples.rstrip(".")):
                    if "metric" not in words.split("=")[0] and "=" in words:
                        whole = words if "template.jinja" not in words else f"template=custom {words}"
                        found.setdefault(("posttrain", whole), path.relative_to(ROOT))
    return found


def split(words):
    """The words of a command, without remarks, pipes and what stands for more."""
    words = re.split(r"\s+#|\s\||;|\s{3,}|\s{2}\(", words)[0]
    return [word for word in shlex.split(words.replace("<TAB>", "")) if word != "..."]


def write_rows(folder, overrides):
    """The file of `data.path`, with a row of the format that is chosen."""
    chosen = dict(word.split("=", 1) for word in overrides if "=" in word)
    if "data.path" not in chosen or chosen["data.path"].startswith("hf:"):
        return False
    kind = "text" if chosen.get("objective") == "text" else chosen.get("data", "messages")
    row = ROWS[kind]
    path = folder / chosen["data.path"]
    if chosen["data.path"].endswith("/") or path.suffix == ".txt":
        path = path if path.suffix else path / "a.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text("a text\n")
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row] * 2), path)
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([row, [json.dumps(x) if isinstance(x, list) else x for x in row.values()]])
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(json.dumps(row).encode()))
    else:
        other = {**row, "other": 1}  # so that something can be held out
        path.write_text("".join(json.dumps(each) + "\n" for each in (row, other)))
    return True


def test_commands_are_found():
    found = {module for module, _ in commands()}
    assert {"posttrain", "posttrain.preview", "posttrain.plan", "posttrain.evaluate", "posttrain.convert"} <= found
    assert ("posttrain", "template=custom template.file=my.jinja") in commands()
    for module in found:
        assert importlib.util.find_spec(module), module


def test_layouts_that_are_named_can_be_chosen():
    """A table's `ep4` is typed as `parallelism=ep4`."""
    known = {path.stem for path in (CONF_DIR / "parallelism").glob("*.yaml")}
    named = set()
    for path in [*(ROOT / "docs").glob("*.md"), ROOT / "README.md", ROOT / "bench" / "README.md"]:
        named |= set(LAYOUT.findall(path.read_text(encoding="utf-8")))
    assert {"tp2", "ep4"} <= named <= known, named - known


@pytest.fixture
def folder(tmp_path, monkeypatch, capsys):
    """A folder to type commands in: with a tokenizer, a template, and what they may name."""
    byte_tokenizer(bos="<s>").save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "my.jinja").write_text(CHATML)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "docs" / "examples")
    monkeypatch.setenv("POSTTRAIN_ALLOW_TARGETS", "ticket_format,length_normalized,starcoder2")
    return tmp_path


def test_commands_with_data_are_accepted(folder):
    """Those of conf/ and of the page on data: a small file of each kind is previewed."""
    try_all(folder, lambda path: path.parts[0] == "conf" or path.name in ("data.md", "objectives.md"))


@pytest.mark.nightly
def test_all_other_commands_are_accepted(folder):
    """A minute: every one is composed."""
    try_all(folder, lambda path: path.parts[0] != "conf" and path.name not in ("data.md", "objectives.md"))


def try_all(folder, wanted):
    """Try every command that is shown in one of the wanted files, in one process."""
    failed = []
    for (module, shown), path in commands().items():
        if wanted(path):
            try:
                try_command(module, split(shown), folder)
            except (UserError, HydraException, ValueError, KeyError) as error:
                failed.append(f"{path}: {module} {shown}: {type(error).__name__}: {error}")
    assert not failed, "\n".join(failed)


def try_command(module, words, folder):
    """Compose and check one command.

    Raises:
        UserError: it is refused.
    """
    if any(mistake in word for word in words for mistake in MISTAKES) or "--help" in words:
        return
    config = CONFIGS.get(module)
    if config is None:
        return  # its arguments are its own
    if config != "config" and module != "posttrain.preview":
        importlib.import_module(f"{module}.__main__")  # has the schema of its options
    overrides = []
    if "--config-dir" in words:
        place = ROOT / words[words.index("--config-dir") + 1]
        if not (place / "data").is_dir() or place == CONF_DIR:  # one that another command writes
            return
        overrides.append(f"hydra.searchpath=[file://{place}]")
    for before, word in zip(["", *words], words, strict=False):
        key, given, value = word.partition("=")
        if (
            not given
            or before in ("--rerun", "--resume")
            or key.startswith("[")
            or key.partition(".")[0] in NOT_COMPOSED
        ):
            continue
        if key == "checkpoint":  # as convert reads it
            key = "convert.checkpoint"
        value = STANDING.get(value, value)
        if value in ("", "NAME", "..."):
            return
        overrides.append(f"{key}={value}")
    with_data = module in DATA_COMMANDS and write_rows(folder, overrides)
    if with_data:
        config = "preview"
        overrides = [word for word in overrides if not word.startswith("plan.")]
        overrides += ["model.tokenizer=tokenizer", "template.add_special_tokens=true", "cache_dir=cache"]
        if not any(word.startswith("template=") or word == "objective=text" for word in overrides):
            overrides.append("template=chatml")
    first, *_ = trials(quote_expressions(overrides))
    cfg = command.compose(first, config)
    if module == "posttrain" and "launch.submit=true" not in first:
        checks.check_ranges(cfg)
        checks.check_trainer(cfg, GPUS)
    if with_data:
        preview.show_data(cfg)
