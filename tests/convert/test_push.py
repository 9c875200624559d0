"""Pushing to a hub: refused unless everything is said; and a real upload to a server on this machine."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from posttrain.config.composition import compose
from posttrain.convert import push
from posttrain.convert.__main__ import run
from posttrain.errors import UserError


@pytest.fixture
def export(tmp_path):
    """A finished export as far as a push looks at it."""
    directory = tmp_path / "run" / "hf"
    directory.mkdir(parents=True)
    (directory / "README.md").write_text("---\nlicense: mit\n---\n# card\n")
    (directory / "verification.json").write_text(json.dumps({"logits": {"checked": True}}))
    return directory


@pytest.fixture
def token(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


def command(*words):
    run(compose(["convert.command=push", *words], "convert"))


def test_refused_without_repository_or_token(export, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    for words, message in (
        ([], "`checkpoint`: has no value"),
        ([f"convert.checkpoint={export}"], "`convert.repo`: has no value"),
        ([f"convert.checkpoint={export}", "convert.repo=name"], "must be OWNER/NAME"),
        ([f"convert.checkpoint={export}", 'convert.repo="../a b/c"'], "must be OWNER/NAME"),
        ([f"convert.checkpoint={export}", "convert.repo=me/model"], "HF_TOKEN"),
        (["convert.command=merge", "convert.push=true", "convert.out=x", f"convert.checkpoint={export}"], "no value"),
        (["convert.command=import", "convert.push=true", "convert.out=x"], "export and merge"),
    ):
        with pytest.raises(UserError, match=message):
            command(*words)
    with pytest.raises(UserError, match="is given on the command line"):
        run(
            compose(["convert.command=push", f"convert.checkpoint={export}", "convert.repo=me/model"], "convert"), False
        )
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE"):
        command(f"convert.checkpoint={export}", "convert.repo=me/model")


def test_refused_where_others_could_not_trust_or_load_it(export, token, tmp_path):
    push.check_pushable(export, allow_unverified=False)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no finished export"):
        command(f"convert.checkpoint={tmp_path / 'empty'}", "convert.repo=me/model")
    (export / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/my/disk/base"}))
    with pytest.raises(UserError, match="only this machine has; merge it first"):
        push.check_pushable(export, allow_unverified=False)
    (export / "adapter_config.json").unlink()
    for report in ({"logits": {"checked": False, "reason": "x"}}, None):
        file = export / "verification.json"
        file.write_text(json.dumps(report)) if report else file.unlink()
        with pytest.raises(UserError, match=r"convert\.allow_unverified=true"):
            push.check_pushable(export, allow_unverified=False)
        push.check_pushable(export, allow_unverified=True)
    (export / "README.md").unlink()
    with pytest.raises(UserError, match="no model card"):
        push.check_pushable(export, allow_unverified=True)


@pytest.fixture
def hub(monkeypatch, token):
    """A server that speaks what an upload of small files needs of the hub's API; what it got is in `received`."""
    received = {"private": None, "files": {}, "tokens": set(), "public": False, "status": 200}

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def answer(self, body, status=200):
            text = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def do_GET(self):
            private = received["private"] and not received["public"]
            self.answer({"id": "me/model", "private": private, "sha": "0" * 40, "siblings": [], "tags": []})

        def do_POST(self):
            received["tokens"].add(self.headers["Authorization"])
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if received["status"] != 200:
                self.answer({"error": "not yours"}, received["status"])
            elif self.path.endswith("/repos/create"):
                fields = json.loads(body)
                received["private"] = fields.get("visibility") == "private" or fields.get("private")
                self.answer({"url": f"{received['url']}/me/model"})
            elif "/preupload/" in self.path:
                files = json.loads(body)["files"]
                self.answer(
                    {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
                )
            elif "/commit/" in self.path:
                for line in body.splitlines():
                    row = json.loads(line)
                    if row["key"] == "file":
                        received["files"][row["value"]["path"]] = base64.b64decode(row["value"]["content"])
                self.answer({"commitUrl": f"{received['url']}/me/model/commit/1", "commitOid": "1" * 40})
            else:
                self.answer({})

    server = HTTPServer(("127.0.0.1", 0), Handler)
    received["url"] = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", received["url"])
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", received["url"])
    yield received
    server.shutdown()


def test_an_upload(export, hub):
    """All files, with the token, to a private repository unless told otherwise; a public one of that name is left."""
    token = push.token_for("me/model")
    push.upload(export, "me/model", token, private=True)
    assert hub["private"] and hub["tokens"] == {"Bearer hf_test"}
    assert hub["files"] == {path.name: path.read_bytes() for path in export.iterdir()}
    push.upload(export, "me/model", token, private=False)
    assert not hub["private"]
    hub["public"] = True
    hub["files"].clear()
    with pytest.raises(UserError, match=r"public; convert\.private=false"):
        push.upload(export, "me/model", token, private=True)
    assert not hub["files"]
    hub |= {"status": 403, "public": False, "private": True}
    with pytest.raises(UserError, match=r"convert\.repo=me/model: the hub refuses"):
        push.upload(export, "me/model", token, private=True)
