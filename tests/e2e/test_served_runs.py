"""`transformers serve` answers with a run's export what `posttrain.generate` answers."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from commands import environment

pytestmark = pytest.mark.nightly
ROOT = Path(__file__).resolve().parents[2]
SERVER = "import sys; from transformers.cli.transformers import main; sys.argv[0] = 'transformers'; main()"
QUESTION = "say 3 la la"
TOKENS = 8


@pytest.fixture(scope="module")
def packages(tmp_path_factory) -> Path:
    """What `transformers serve` needs beside transformers, in a folder of its own."""
    folder = tmp_path_factory.mktemp("serving")
    command = [ROOT / "scripts" / "uv.sh", "pip", "install", "--python", sys.executable, "--target", folder]
    # Not in the checkout's folder: uv would read there that the lock leaves these out.
    done = subprocess.run([*command, "fastapi", "uvicorn", "openai"], cwd=folder, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"the packages of transformers[serving] can't be had: {done.stderr.splitlines()[-1:]}")
    return folder


@pytest.fixture
def server(packages, posttrain, tmp_path):
    """The address of a server that loads the model that it is asked for."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    env = environment(posttrain.cache)
    env |= {"PYTHONPATH": os.pathsep.join([env["PYTHONPATH"], str(packages)]), "HF_HOME": str(tmp_path)}
    log = tmp_path / "server.log"
    command = [sys.executable, "-c", SERVER, "serve", "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    with log.open("w") as file, subprocess.Popen(command, env=env, stdout=file, stderr=file) as process:
        try:
            deadline = time.monotonic() + 240
            while not answers(f"http://127.0.0.1:{port}/health"):
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.5)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


def answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=5) as response:
            return response.status == 200
    except OSError:
        return False


def ask(server: str, model: Path) -> str:
    """The greedy answer to QUESTION, over OpenAI's protocol."""
    body = {
        "model": str(model),
        "messages": [{"role": "user", "content": QUESTION}],
        "max_tokens": TOKENS,
        "temperature": 0,
        "stream": False,
    }
    request = urllib.request.Request(
        f"{server}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=240) as response:
            return json.load(response)["choices"][0]["message"]["content"]
    except urllib.error.HTTPError as error:
        raise AssertionError(error.read().decode()) from error


def test_the_merged_weights(server, posttrain, words, tmp_path):
    run = posttrain(*words)
    assert run.code == 0, run.err
    merged = tmp_path / "merged"
    env = environment(posttrain.cache)
    command = [sys.executable, "-m", "posttrain.convert", "merge", f"checkpoint={run.run_dir}", f"convert.out={merged}"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    command = [sys.executable, "-m", "posttrain.generate", str(run.run_dir), "--json"]
    command += ["--max-new-tokens", str(TOKENS), QUESTION]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = json.loads(done.stdout.splitlines()[-1])["answer"]
    assert expected and ask(server, merged) == expected
