"""What lies beside a stranger's weights and is read, or copied into what people publish: its own files alone."""

import os
import subprocess
import sys

import pytest
import torch
from test_malicious_files import write_model
from tiny_tokenizer import byte_tokenizer

from posttrain.convert.artifacts import copy_generation_config, copy_tokenizer
from posttrain.errors import UserError
from posttrain.models import HFModel
from posttrain.models.headers import MAX_JSON

TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"
TENSORS = {
    "model.embed_tokens.weight": torch.zeros(32, 8),
    "lm_head.weight": torch.ones(32, 8),
    "model.layers.0.input_layernorm.weight": torch.zeros(8),
}
SECRET = "machine example.org password hunter2"


@pytest.fixture
def model(tmp_path):
    """A model with a tokenizer and a template."""
    directory = write_model(tmp_path / "model", tensors=TENSORS)
    byte_tokenizer().save_pretrained(directory)
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    (directory / "generation_config.json").write_text("{}")
    return directory


@pytest.fixture
def secret(tmp_path):
    """A file of the user's."""
    file = tmp_path / "home" / ".netrc"
    file.parent.mkdir()
    file.write_text(SECRET)
    return file


def link(file, target):
    file.unlink(missing_ok=True)
    file.symlink_to(target)


def copied(tmp_path, source):
    out = tmp_path / "out"
    out.mkdir(exist_ok=True)
    copy_tokenizer(out, source)
    copy_generation_config(out, source)
    return {file.name: file for file in out.iterdir()}


def test_only_a_tokenizers_files_are_copied(model, secret, tmp_path):
    """A name that merely looks like one of them is not."""
    link(model / "tokenizer_notes.txt", "/proc/self/environ")
    link(model / "login.model", secret)
    link(model / "chat_template_notes.txt", secret)
    HFModel(path=str(model)).load_tokenizer()
    found = copied(tmp_path, model)
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"} <= found.keys()
    assert not found.keys() & {"tokenizer_notes.txt", "login.model", "chat_template_notes.txt"}
    assert not any(SECRET in file.read_text() for file in found.values())


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("chat_template.jinja", "absolute"),
        ("chat_template.jinja", "relative"),
        ("chat_template.jinja", "twice"),
        ("chat_template.jinja", "process"),
        ("tokenizer.json", "absolute"),
        ("tokenizer_config.json", "relative"),
        ("vocab.json", "absolute"),
        ("generation_config.json", "absolute"),
    ],
)
def test_links_out_of_the_folder_are_refused(name, how, model, secret, tmp_path):
    """By name, by all that reads or copies them."""
    target = {"absolute": secret, "relative": "../home/.netrc", "twice": "inner", "process": "/proc/self/environ"}[how]
    if how == "twice":
        link(model / "inner", secret)
    link(model / name, target)
    for attempt in (lambda: HFModel(path=str(model)).directory, lambda: copied(tmp_path, model)):
        with pytest.raises(UserError, match=rf"{name}: is a link that leads out of its directory"):
            attempt()
    if name != "generation_config.json":
        with pytest.raises(UserError, match=rf"{name}: is a link that leads out of its directory"):
            HFModel(path=str(model)).load_tokenizer()


def test_folders_of_templates(model, secret):
    """Neither the folder may be a link, nor a file in it."""
    folder = model / "additional_chat_templates"
    folder.mkdir()
    link(folder / "mine.jinja", secret)
    with pytest.raises(UserError, match=r"mine\.jinja: is a link that leads out"):
        HFModel(path=str(model)).load_tokenizer()
    (folder / "mine.jinja").unlink()
    folder.rmdir()
    link(folder, secret.parent)
    with pytest.raises(UserError, match="additional_chat_templates: is a link that leads out"):
        HFModel(path=str(model)).load_tokenizer()


def test_other_kinds_of_files(model, tmp_path):
    """Pipes, folders, and files that would fill a disk."""
    file = model / "chat_template.jinja"
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(UserError, match=r"chat_template\.jinja: is not a regular file"):
        HFModel(path=str(model)).load_tokenizer()
    file.unlink()
    file.mkdir()
    with pytest.raises(UserError, match=r"chat_template\.jinja: is not a regular file"):
        copied(tmp_path, model)
    file.rmdir()
    with file.open("wb") as sparse:
        sparse.truncate(MAX_JSON + 1)
    with pytest.raises(UserError, match=r"chat_template\.jinja: has 209715201 bytes, more than the 200 MiB"):
        copied(tmp_path, model)


@pytest.mark.parametrize("folder", ["", "inner"])
def test_links_of_the_hubs_cache(folder, model, secret, tmp_path):
    """A snapshot is made of links to its blobs, also in a folder of a snapshot; a link from there elsewhere is none."""
    cache = tmp_path / "models--someone--model"
    blobs, snapshot = cache / "blobs", cache / "snapshots" / "0123abc" / folder
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(model.iterdir())):
        file.rename(blobs / str(number))
        link(snapshot / file.name, os.path.relpath(blobs / str(number), snapshot))
    assert HFModel(path=str(snapshot)).directory == snapshot
    HFModel(path=str(snapshot)).load_tokenizer()
    assert copied(tmp_path, snapshot)["chat_template.jinja"].read_text() == TEMPLATE
    link(snapshot / "chat_template.jinja", secret)
    with pytest.raises(UserError, match=r"chat_template\.jinja: is a link that leads out"):
        HFModel(path=str(snapshot)).load_tokenizer()
    link(snapshot / "chat_template.jinja", blobs / "secret")
    link(blobs / "secret", secret)
    with pytest.raises(UserError, match=r"chat_template\.jinja: is a link that leads out"):
        HFModel(path=str(snapshot)).load_tokenizer()


def test_links_within_the_folder_and_to_it(model, tmp_path):
    """The folder may be reached through a link, and its files may be links to others of it."""
    (model / "chat_template.jinja").rename(model / "mine.jinja")
    link(model / "chat_template.jinja", "mine.jinja")
    link(tmp_path / "shortcut", model)
    source = tmp_path / "shortcut"
    assert HFModel(path=str(source)).directory == source
    HFModel(path=str(source)).load_tokenizer()
    out = copied(tmp_path, source)
    assert out["chat_template.jinja"].read_text() == TEMPLATE and not out["chat_template.jinja"].is_symlink()


def test_the_command_says_so(model, secret, tmp_path):
    """Exit code 2, one line, and not the file's text."""
    link(model / "chat_template.jinja", secret)
    (tmp_path / "rows.jsonl").write_text('{"messages": [{"role": "user", "content": "Hello"}]}\n')
    words = [f"model.path={model}", "data=messages", f"data.path={tmp_path / 'rows.jsonl'}"]
    done = subprocess.run(
        [sys.executable, "-m", "posttrain.preview", *words], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 2, done.stderr
    assert "chat_template.jinja: is a link that leads out of its directory" in done.stderr
    assert "Traceback" not in done.stderr and SECRET not in done.stdout + done.stderr
