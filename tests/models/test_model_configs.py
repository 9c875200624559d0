"""Every file of conf/model composes, and its architecture is the published model's, to the parameter."""

import json
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

CONF = Path(__file__).parents[2] / "conf"
NAMES = sorted(file.stem for file in (CONF / "model").glob("*.yaml"))
# Parameters in millions, tied embeddings counted once, from the models' cards and safetensors indices.
MILLIONS = {
    "gemma2_27b": 27227.1,
    "gemma2_2b": 2614.3,
    "gemma2_9b": 9241.7,
    "gemma_2b": 2506.2,
    "gemma_7b": 8537.7,
    "gpt2": 124.4,
    "gpt2_large": 774.0,
    "gpt2_medium": 354.8,
    "gpt2_xl": 1557.6,
    "gpt_neox_20b": 20554.6,
    "llama1_13b": 13015.9,
    "llama1_30b": 32528.9,
    "llama1_65b": 65285.7,
    "llama1_7b": 6738.4,
    "llama2_13b": 13015.9,
    "llama2_70b": 68976.6,
    "llama2_7b": 6738.4,
    "llama31_405b": 405853.4,
    "llama31_70b": 70553.7,
    "llama31_8b": 8030.3,
    "llama32_1b": 1235.8,
    "llama32_3b": 3212.7,
    "llama33_70b": 70553.7,
    "llama3_70b": 70553.7,
    "llama3_8b": 8030.3,
    "mistral_7b_v01": 7241.7,
    "mistral_7b_v03": 7248.0,
    "mixtral_8x7b": 46702.8,
    "pythia_12b": 11846.1,
    "pythia_160m": 162.3,
    "pythia_1b": 1011.8,
    "pythia_1b4": 1414.6,
    "pythia_2b8": 2775.2,
    "pythia_410m": 405.3,
    "pythia_6b9": 6857.3,
    "pythia_70m": 70.4,
    "qwen25_0b5": 494.0,
    "qwen25_14b": 14770.0,
    "qwen25_1b5": 1543.7,
    "qwen25_32b": 32763.9,
    "qwen25_3b": 3085.9,
    "qwen25_72b": 72706.2,
    "qwen25_7b": 7615.6,
    "qwen2_0b5": 494.0,
    "qwen2_1b5": 1543.7,
    "qwen2_72b": 72706.2,
    "qwen2_7b": 7615.6,
    "qwen3_0b6": 596.0,
    "qwen3_14b": 14768.3,
    "qwen3_1b7": 1720.6,
    "qwen3_235b_a22b": 235093.6,
    "qwen3_30b_a3b": 30532.1,
    "qwen3_32b": 32762.1,
    "qwen3_4b": 4022.5,
    "qwen3_8b": 8190.7,
    "smollm2_135m": 134.5,
}
TUNED = ("_instruct", "_chat", "_it")


def base(name: str) -> str:
    """The name without the suffix of a tuned version, which has the same architecture."""
    return next((name.removesuffix(end) for end in TUNED if name.endswith(end)), name)


QUIET = ["hydra/job_logging=none", "hydra/hydra_logging=none"]  # as the project's own; others are refused


@pytest.fixture(scope="module")
def composed() -> dict[str, dict]:
    """Every config of the group except `hf`, composed by itself."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return {name: compose(overrides=[f"+model={name}", *QUIET]).model for name in NAMES if name != "hf"}


@pytest.fixture(scope="module")
def parameters() -> dict[str, int]:
    return {}


def test_the_table_covers_the_group():
    assert {base(name) for name in NAMES} - {"hf"} == set(MILLIONS)


def test_hf_needs_a_path_only():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        model = instantiate(compose(overrides=["+model=hf", "model.path=gpt2", *QUIET]).model)
    assert (model.path, model.architecture, model.random_init, model.trust_remote_code) == ("gpt2", None, False, False)


def test_every_option_of_every_file_has_a_comment():
    for file in (CONF / "model").rglob("*.yaml"):
        lines = file.read_text().splitlines()
        assert lines[0].startswith("# "), file
        for line in lines:
            option = line.split("#")[0].rstrip()
            nested = option.endswith(":") or option.startswith("    ")
            assert nested or ": " not in option or "#" in line or option.startswith("_target_"), f"{file}: {line}"


@pytest.mark.parametrize("name", [name for name in NAMES if name != "hf"])
def test_architecture_has_the_published_number_of_parameters(name, composed, parameters):
    import torch
    from transformers import AutoModelForCausalLM

    model = instantiate({**composed[name], "random_init": True})
    config = model.hf_config()
    shape = {key: value for key, value in config.to_dict().items() if "token_id" not in key and key != "rms_norm_eps"}
    key = json.dumps(shape, sort_keys=True, default=str)
    if key not in parameters:
        with torch.device("meta"):
            module = AutoModelForCausalLM.from_config(config)
        assert [type(module).__name__] == config.architectures
        parameters[key] = module.num_parameters()
    assert parameters[key] / 1e6 == pytest.approx(MILLIONS[base(name)], rel=1e-3)
