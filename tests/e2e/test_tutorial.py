"""The commands of docs/tutorial.md, as they stand there and in that order, on the real small model."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.nightly

ROOT = Path(__file__).resolve().parents[2]
pytest.importorskip("gguf", reason="needs the extra `demo`")


def blocks() -> list[str]:
    """The shell commands of the page."""
    return re.findall(r"^```bash\n(.*?)^```", (ROOT / "docs" / "tutorial.md").read_text(), re.MULTILINE | re.DOTALL)


def test_every_command_of_the_tutorial(tmp_path, demo_cache):
    """As typed in the activated environment, in an empty folder. About 90 s on two quiet cores."""
    activate, *commands = blocks()
    assert activate == "source .venv/bin/activate\n" and len(commands) == 9 + 1  # nine commands and a file
    env = {
        **os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "POSTTRAIN_CACHE": str(demo_cache),
    }  # fmt: skip
    out = {}
    for command in commands:
        done = subprocess.run(["bash", "-e", "-c", command], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        if "python" in command:
            out[re.search(r"posttrain(\.\w+| --multirun)?", command)[0]] = done.stdout
    assert "⟦Tuesday to Saturday, nine to five.<|im_end|>⟧" in out["posttrain.preview"]
    assert re.search(r"^fits: [\d.]+ of 79.2 GiB", out["posttrain.plan"], re.MULTILINE)
    before, after = map(float, re.search(r"validation loss ([\d.]+) -> ([\d.]+)", out["posttrain"]).groups())
    assert after < before
    measured = re.search(r"shop, validation +([\d.]+)", out["posttrain.evaluate"])[1]
    assert float(measured) == pytest.approx(after, abs=2e-4)
    assert (tmp_path / "outputs/sweeps/shop/report.html").is_file()
    assert " 0.002 " in out["posttrain.report"]
    assert (tmp_path / "shop-model/model.safetensors").is_file()
    assert len(out["posttrain.generate"].strip()) > 1
