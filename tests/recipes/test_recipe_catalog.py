"""The recipes are found without importing Megatron-Bridge, and none is overlooked."""

import ast
import subprocess
import sys
import time

import pytest

from posttrain.errors import UserError
from posttrain.recipes import catalog


def test_every_function_of_the_package_is_found():
    found = set()
    for path in catalog.root().glob("*/**/*.py"):
        for node in ast.parse(path.read_text()).body:
            public = isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
            if public and path.parts[-2] != "utils" and {"sft", "peft"} & set(node.name.split("_")):
                found.add(node.name)
    assert found == set(catalog.recipes()) and len(found) > 100
    assert all(recipe.summary for recipe in catalog.recipes().values() if recipe.text)


@pytest.mark.parametrize(
    "name, text",
    [
        ("llama32_1b_peft_1gpu_h100_bf16_config", True),
        ("exaone45_vl_33b_peft_4gpu_h100_bf16_config", False),
        ("qwen35_vl_2b_peft_1gpu_h100_bf16_config", False),
        ("flux_12b_sft_2gpu_h100_bf16_config", False),
        ("qwen2_audio_7b_sft_1gpu_h100_bf16_config", False),
        ("nemotronh_8b_sft_2gpu_h100_bf16_config", True),
    ],
)
def test_text_is_told_from_images_and_sound(name, text):
    assert catalog.recipes()[name].text is text
    if not text:
        with pytest.raises(UserError, match="image, audio or video model"):
            catalog.find(name)


def test_older_names_lead_to_the_recipe():
    assert catalog.find("llama3_8b_peft_config").name == "llama3_8b_peft_1gpu_h100_bf16_config"


def test_a_misspelt_name_is_guessed():
    with pytest.raises(UserError, match="did you mean `llama32_1b_peft_1gpu_h100_bf16_config`"):
        catalog.find("llama32_1b_peft_1gpu_h10_bf16_config")


@pytest.mark.parametrize("word", ["recipe=list", "recipe.name=list"])
def test_listing_is_quick(word):
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "posttrain", word], capture_output=True, text=True, check=True)
    assert time.perf_counter() - began < 10  # 0.6 s on a quiet machine
    for recipe in catalog.recipes().values():
        assert (recipe.name in done.stdout) is recipe.text
