"""What the hub answers is said in one line, with what to do, and no answer is waited for only so long."""

import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest

from posttrain.cli import command
from posttrain.data import hub_datasets
from posttrain.errors import UserError
from posttrain.models.hf import HFModel
from posttrain.spec import checks
from posttrain.utils import hub

LOG_IN = "hf auth login"
# (status, headers) as the hub sends them; what is said.
ANSWERS = {
    "a private or no model": ((401, {"X-Error-Code": "RepoNotFound"}), ["no such model", LOG_IN]),
    "no such model": ((404, {"X-Error-Code": "RepoNotFound"}), ["no such model", LOG_IN]),
    "a gated one": ((403, {"X-Error-Code": "GatedRepo"}), ["gated", "accept its licence", "/owner/name, then", LOG_IN]),
    "a wrong token": ((401, {"X-Error-Message": "Invalid credentials in Authorization header"}), ["token", LOG_IN]),
    "a token without the right": ((403, {}), ["forbids", LOG_IN]),
    "too many requests": ((429, {"Retry-After": "300"}), ["too many requests", "in 300 s", LOG_IN]),
    "a broken hub": ((503, {}), ["fails (503)", "later"]),
}


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_TELEMETRY", True)  # asks the hub of its own accord
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "_answers", {})


@pytest.fixture
def answering(monkeypatch):
    """A hub on this machine that gives every request one answer."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            status, headers = self.server.answer
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        yield server
        server.shutdown()


@pytest.mark.parametrize("case", ANSWERS)
def test_an_answer(answering, case):
    answering.answer, said = ANSWERS[case]
    with pytest.raises(UserError) as model:
        HFModel(path="owner/name").check_hub()
    with pytest.raises(UserError) as data:
        hub_datasets.revision("hf://owner/name:part@train", "data.path")
    with pytest.raises(UserError, match=r"^model\.tokenizer=owner/name: .*model\.tokenizer=DIR$"):
        _ = HFModel(path="owner/other", tokenizer="owner/name").tokenizer_path
    assert str(model.value).startswith("model.path=owner/name: ") and str(model.value).endswith("model.path=DIR")
    assert str(data.value).startswith("data.path=hf://owner/name:part@train: the hub")
    for words in said:
        assert words in str(model.value)
        assert words.replace("model", "dataset").replace("/owner", "/datasets/owner") in str(data.value)
    assert "\n" not in str(model.value) + str(data.value)


def test_a_run_asks_before_it_has_a_directory(answering):
    """The model, its tokenizer and each file of rows; nothing where both are on this machine."""
    answering.answer = (404, {"X-Error-Code": "RepoNotFound"})
    for words, key in [
        (["model=llama3_8b"], "model.path"),
        (["model.tokenizer=owner/name"], "model.tokenizer"),
        (["data=alpaca", "data.path=hf://owner/name"], "data.path"),
        (["data=alpaca", "data.path=a.json", "data.validation_path=hf://owner/name"], "data.validation_path"),
    ]:
        with pytest.raises(UserError, match=rf"^{key}=.* the hub has no such"):
            checks.check_hub(command.compose(words))
    checks.check_hub(command.compose())


def test_silence_is_given_up(monkeypatch):
    """A server that takes the connection and never answers, once for all that a command wants of a model."""
    monkeypatch.setattr(hub, "PATIENCE", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        begin = time.monotonic()
        for _ in range(5):
            with pytest.raises(UserError, match=r"has not answered for 0\.5 s: check the network"):
                HFModel(path="owner/name").check_hub()
        assert time.monotonic() - begin < 2


def test_nobody_there(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://me:secret@127.0.0.1:{port}")
    with pytest.raises(UserError, match=rf"hub \(127\.0\.0\.1:{port}\) can't be reached .*: check the network"):
        HFModel(path="owner/name").check_hub()


def test_what_is_in_the_cache_is_used(monkeypatch, tmp_path):
    """As `huggingface_hub` lays it out; the name is never asked for when the hub is switched off."""
    commit = "a" * 40
    snapshot = tmp_path / "models--owner--name" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text('{"model_type": "nonesuch"}')
    (tmp_path / "models--owner--name" / "refs").mkdir()
    (tmp_path / "models--owner--name" / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert HFModel(path="owner/name").tokenizer_path == str(snapshot)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        _ = HFModel(path="owner/other").tokenizer_path
