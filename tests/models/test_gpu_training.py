"""The product's LoRA on a GPU, with Transformer Engine in bf16, beside a plain transformers and peft loop.

The band: the curve is no further from the plain loop in fp32 than twice what the plain loop in bf16 is, plus 2 %.
POSTTRAIN_TEST_DEVICE=cpu runs the same on a CPU: narrower models, local layers, bf16.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from curves import environment, error, losses
from families import FAMILIES

pytestmark = [pytest.mark.gpu, pytest.mark.slow]
OTHERS = ["llama-canonical", "llama-dora"]
LEARNS = ["llama-joined", "llama-full"]  # adapters that PEFT hasn't; all weights, whose curves part at this rate
DEVICE = os.environ.get("POSTTRAIN_TEST_DEVICE", "cuda")
WIDTH = {"cuda": "8", "cpu": "2"}[DEVICE]  # kernels of GPUs want heads of 64


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Where the runs are, each in a folder runs/CASE."""
    if DEVICE == "cuda" and not os.path.exists("/dev/nvidiactl"):
        pytest.skip("no GPU")
    return tmp_path_factory.mktemp("training")


@pytest.fixture(scope="module")
def results(directory) -> dict[str, dict]:
    """Losses of every case; on a GPU each in a process of its own, since Megatron captures one step per process."""
    cases = [*OTHERS, *LEARNS, *(f"{family}-lora" for family in FAMILIES)]
    options = ["--device", DEVICE, "--bf16", "--width", WIDTH, "--words", "checkpoint.save_total_limit=1"]
    if DEVICE == "cpu":
        return losses(directory, cases, *options)

    def alone(case: str) -> dict[str, dict]:
        (directory / case).mkdir()
        return losses(directory / case, [case], *options)

    with ThreadPoolExecutor(8) as pool:
        return dict(item for found in pool.map(alone, cases) for item in found.items())


@pytest.mark.parametrize("case", [*(f"{family}-lora" for family in FAMILIES), *OTHERS])
def test_loss_curve_in_bf16(case, results):
    result = results[case]
    assert "error" not in result, result["error"]
    ours, noise = error(result["ours"], result["plain"]), error(result["plain_bf16"], result["plain"])
    print(f"{case}: {result['ours'][0]:.3f} to {result['ours'][-1]:.3f}; transformers {noise:.4f}, Megatron {ours:.4f}")
    assert len(result["ours"]) == 20 and result["ours"][-1] < 0.9 * result["ours"][0]
    assert ours < 2 * noise + 0.02


@pytest.mark.parametrize("case", LEARNS)
def test_learns(case, results):
    result = results[case]
    assert "error" not in result, result["error"]
    print(f"{case}: {result['ours'][0]:.3f} to {result['ours'][-1]:.3f}; transformers {result['plain'][-1]:.3f}")
    assert result["ours"][-1] < 0.5 * result["ours"][0]


@pytest.mark.parametrize("case", [*(f"{family}-lora" for family in FAMILIES), *OTHERS, *LEARNS])
def test_export_was_compared(case, results):
    found = results[case].get("export")
    assert found, results[case].get("error")
    assert found["checked"] and found["arithmetic"] == "bfloat16" and found["difference"] <= found["tolerance"]


@pytest.mark.parametrize("case", ["llama-full", "gpt2-lora"])
def test_its_checkpoint_is_exported_elsewhere(case, results, directory):
    """On a CPU without Transformer Engine: the same tensors as the run's own export."""
    from safetensors.torch import load_file

    (run_dir,) = directory.rglob(f"runs/{case}")
    out = directory / f"{case}-exported"
    words = ["export", f"checkpoint={run_dir}", f"convert.out={out}"]
    done = subprocess.run(
        [sys.executable, "-m", "posttrain.convert", *words], env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((out / "verification.json").read_text())["logits"]["checked"]
    (file,) = out.glob("*.safetensors")
    found, own = load_file(file), load_file(run_dir / ("hf" if "full" in case else "adapter") / file.name)
    assert found.keys() == own.keys() and all(found[name].equal(own[name].to(found[name].dtype)) for name in own)
