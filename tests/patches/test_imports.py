"""What a text run imports. One fresh process imports it all (import_probe.py); the tests read what it saw."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from posttrain.patches.startup import imports

HEAVY = {
    "diffusers",
    "fla",
    "megatron.bridge.diffusion",
    "megatron.energon",
    "modelopt",
    "multistorageclient",
    "nvidia_resiliency_ext",
    "pandas",
    "datasets",
    "scipy",
    "setuptools",
    "sklearn",
    "sympy",
    "tensorboard",
    "torch._dynamo.convert_frame",
    "torch._inductor",
    "torchvision",
    "transformers.modeling_utils",
    "transformers.models.auto.modeling_auto",
    "wandb",
}


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What import_probe.py printed. On its path are packages that must not be imported."""
    folder = tmp_path_factory.mktemp("path")
    for name in ("transformer_engine", "torchvision"):
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text("raise RuntimeError('imported on a CPU')")
    (folder / "torchvision-0.26.0.dist-info").mkdir()
    (folder / "torchvision-0.26.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: torchvision\nVersion: 0.26.0\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}
    probe = Path(__file__).with_name("import_probe.py")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", probe], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_patches_alone_cost_nothing(seen):
    assert not seen["torch from patches"] and seen["cpu of patches"] < 1


def test_a_few_times_torch_alone(seen):
    """3.2 times on a quiet machine; upstream's own imports take 10 times. Seconds depend on the machine."""
    program = "import time, torch; print(time.process_time())"
    torch = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert seen["cpu"] <= 5 * float(torch.stdout)


def test_nothing_heavy(seen):
    assert not HEAVY & set(seen["modules"])
    assert len(seen["modules"]) < 3000


def test_torchvision_is_there_and_waits(seen):
    assert seen["torchvision installed"] and "torchvision" not in seen["modules"]


def test_distributions_are_found_by_name_before_all_are_read():
    from posttrain.patches.startup.transformers_imports import Providers

    read = []
    providers = Providers(lambda: read.append(1) or {"PIL": ["pillow"]})
    assert providers["numpy"] == ["numpy"] and not read
    assert providers["PIL"] == ["pillow"] and read
    assert providers.get("nowhere", []) == [] and list(providers) == ["PIL"] and len(read) == 1


def test_no_family_but_those_asked_for(seen):
    families = {module.split(".")[3] for module in seen["modules"] if module.startswith("megatron.bridge.models.")}
    machinery = {"_deprecation", "common", "config", "conversion", "decorators", "gpt", "gpt_provider", "hf_pretrained"}
    machinery |= {
        "hybrid",
        "mamba",
        "megatron_mimo",
        "model_provider",
        "t5_provider",
        "transformer_config",
        "mla_provider",
    }
    assert families - machinery == {"llama", "mistral", "gemma", "qwen"}


def test_no_transformer_engine_means_false_flags(seen):
    assert "hide-transformer-engine" in seen["applied"]
    assert len(seen["flags"]) == 3 and not any(seen["flags"].values())


def test_compiled_functions_work_without_dynamo(seen):
    assert seen["swiglu"] and seen["compiled at run time"] == 7


def test_configurations_survive(seen):
    assert {"train", "model", "dataset", "peft", "checkpoint"} <= set(seen["hints"])
    assert seen["train"]["train_iters"] == 3 and seen["train"]["_target_"].endswith("TrainingConfig")
    assert seen["config recognised"]
    assert [target.rpartition(".")[2] for target in seen["peft"]] == ["LoRA", "DoRA", "CanonicalLoRA"]


def test_bridge_without_the_model_class(seen):
    assert seen["layers"] == 2 and not seen["model class"]
    assert "NothingForCausalLM" in seen["unsupported"] and "LlamaForCausalLM" in seen["unsupported"]


def test_missing_package_is_named(seen):
    assert seen["nothing to save"] is None
    assert "modelopt is not installed" in seen["missing"]


def test_real_wandb_afterwards(seen):
    assert not seen["wandb before"]
    assert seen["wandb"] == ["module", True, "Deferred", "wandb"]


def test_every_text_family_is_found():
    found = imports.bridge_modules()
    assert found["Qwen3MoeForCausalLM"] == "megatron.bridge.models.qwen.qwen3_moe_bridge"
    assert found["Ernie4_5_MoeForCausalLM"] == "megatron.bridge.models.ernie.ernie_45_bridge"  # a constant's name
    assert found["Mistral3ForConditionalGeneration"].endswith("ministral3_bridge")  # registered by a call
    assert len(found) > 50 and not [module for module in found.values() if ".conversion." in module]


@pytest.mark.nightly  # ten seconds of torch.compile's imports
def test_a_fusion_inside_a_fusion_is_one_graph():
    """On a GPU, where functions are compiled when first called: one that calls another must still be traced whole."""
    code = """
from posttrain import patches
patches.apply(patches.Platform(device="cuda", transformer_engine=False))
import torch
from megatron.core.fusions.fused_bias_swiglu import bias_swiglu  # calls swiglu, which is decorated too
x, bias = torch.randn(4, 8), torch.randn(8)
traced = torch.compile(bias_swiglu.__wrapped__, fullgraph=True, backend="eager")
expected = torch.nn.functional.silu((x + bias)[:, :4]) * (x + bias)[:, 4:]
assert torch.allclose(traced(x, bias), expected, atol=1e-6)
"""
    environment = {name: value for name, value in os.environ.items() if name != "TORCHDYNAMO_DISABLE"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr
