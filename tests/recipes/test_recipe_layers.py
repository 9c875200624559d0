"""From a recipe to a configuration: what wins, what is carried over, and that every recipe passes the checks."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from posttrain.cli.command import compose
from posttrain.errors import UserError
from posttrain.recipes import catalog, layer, resolve
from posttrain.recipes.__main__ import show_recipe
from posttrain.recipes.translate import translate_recipe
from posttrain.spec import checks

ROOT = Path(__file__).resolve().parents[2]
PEFT, SFT = "llama32_1b_peft_1gpu_h100_bf16_config", "llama32_1b_sft_1gpu_h100_bf16_config"
# Those whose model is in conf/model; the others take a model of the user's choice.
FAMILIES = re.compile(r"llama|qwen2_|qwen25_|qwen3_(?!next)|gemma2")
UNUSABLE = {  # text recipes of Megatron-Bridge 0.6.2 that can't be had, and why
    "qwen3_next_80b_a3b_peft_1gpu_h100_bf16_config": "NotImplementedError",  # says so itself
    "qwen3_600m_sft_8gpu_h100_bf16_yarn_128k_config": "changes the model itself",
}
TEXT = [recipe.name for recipe in catalog.recipes().values() if recipe.text]


def test_a_recipe_alone(cached):
    cfg = compose([f"recipe.name={PEFT}"])
    assert cfg.recipe.name == PEFT
    assert cfg.model.path == "meta-llama/Llama-3.2-1B" and cfg.model.architecture.hidden_size == 2048
    assert (cfg.peft._target_, cfg.peft.rank, cfg.peft.alpha) == ("posttrain.peft.LoRA", 32, 32)
    assert (cfg.optimizer.lr, cfg.optimizer.adam_beta2) == (1e-4, 0.98)
    assert cfg.optimizer.weight_decay == 0.033  # what Megatron's scheduler makes of the recipe's 0.1
    assert (cfg.scheduler.lr_warmup_iters, cfg.scheduler.lr_warmup_fraction) == (50, None)
    t = cfg.trainer
    assert (t.max_steps, t.global_batch_size, t.micro_batch_size, t.seq_length) == (1000, 8, 1, 4096)
    assert (t.validation_interval, t.validation_batches, cfg.checkpoint.save_interval) == (30, 32, 50)
    assert (cfg.precision.name, cfg.seed) == ("bf16", 5678)
    full = compose([f"recipe={SFT}"])
    assert full.peft._target_ is None and full.optimizer.lr == 5e-6 and full.parallelism.distributed_optimizer


def test_layers_that_are_computed_again():
    found = resolve.resolve_recipe(catalog.recipes()[PEFT])
    model = found["sections"]["model"]["values"]
    model |= {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 7}
    done = translate_recipe(PEFT, found)
    assert (done.values["trainer.recompute"], done.values["trainer.recompute_layers"]) == ("full", 7)
    model |= {"recompute_method": "uniform"}
    done = translate_recipe(PEFT, found)
    assert "trainer.recompute_layers" not in done.values
    assert "model.recompute_num_layers=7: layers are computed again one by one" in done.left_out
    assert not [key for key in done.values if "megatron.model.recompute" in key]


@pytest.mark.parametrize(
    "words, key, value",
    [
        # Options win over everything.
        (["optimizer.lr=3e-5"], "optimizer.lr", 3e-5),
        (["peft.rank=4"], "peft.rank", 4),
        (["seed=1"], "seed", 1),
        (["peft=none", "optimizer.lr=3e-5"], "optimizer.lr", 3e-5),
        # A chosen group replaces the recipe's, also what its file says about other groups.
        (["peft=none"], "peft._target_", None),
        (["peft=none"], "peft.rank", 16),
        (["peft=none"], "optimizer.lr", 1e-5),
        (["data=demo"], "trainer.max_steps", 10),
        (["experiment=smoke"], "trainer.max_steps", 2),
        (["scheduler=constant"], "scheduler.lr_warmup_fraction", 0.05),
        (["scheduler=constant"], "scheduler.lr_warmup_iters", 0),
        (["precision=auto"], "precision.name", "auto"),
        (["parallelism=tp2"], "parallelism.tensor_model_parallel_size", 2),
        (["model=qwen3_0b6"], "model.path", "Qwen/Qwen3-0.6B"),
        (["optimizer=adam"], "optimizer.weight_decay", 0.0),
        # What was not chosen stays the recipe's.
        (["peft=none"], "trainer.seq_length", 4096),
        (["data=alpaca", "data.path=x.json"], "trainer.max_steps", 1000),
        (["model=qwen3_0b6"], "optimizer.lr", 1e-4),
        (["optimizer=adam"], "trainer.global_batch_size", 8),
    ],
)
def test_recipe_below_groups_below_options(cached, words, key, value):
    assert OmegaConf.select(compose([*words, f"recipe.name={PEFT}"]), key) == value


def test_the_order_of_the_words_does_not_matter(cached):
    words = [f"recipe={PEFT}", "peft=dora", "optimizer.lr=3e-5", "data=demo"]
    assert compose(words) == compose(words[::-1])


def test_preview_takes_recipes_too(cached):
    import posttrain.preview  # noqa: F401  (its schema)

    cfg = compose([f"recipe={PEFT}"], config_name="preview")
    assert (cfg.trainer.seq_length, cfg.preview.limit) == (4096, 3)


@pytest.mark.parametrize(
    "words, message",
    [
        ([f"recipe.name={PEFT},{SFT}"], "one recipe at a time"),
        ([f"recipe.name={PEFT}", f"recipe={SFT}"], "one recipe at a time"),
        (["recipe.name=llama9_peft_config"], "has no such SFT or PEFT recipe. All of them"),
        (["recipe.nam=x"], "did you mean `recipe.name`"),
        (["recipe=gpt_oss_20b_peft_1gpu_h100_bf16_config"], "model=hf model.path=openai/gpt-oss-20b"),
    ],
)
def test_mistakes(cached, words, message):
    with pytest.raises(UserError) as error:
        compose(words)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_settings_of_a_model_that_is_not_in_conf(cached):
    cfg = compose(["recipe=gpt_oss_20b_peft_1gpu_h100_bf16_config", "model=llama32_1b"])
    assert (cfg.model.path, cfg.peft.rank) == ("meta-llama/Llama-3.2-1B", 32)


def test_a_recipe_in_a_file_is_refused(tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(f"# @package _global_\nrecipe: {{name: {PEFT}}}\n")
    with pytest.raises(UserError, match="set it on the command line"):
        compose(["experiment=mine", f"hydra.searchpath=[file://{tmp_path}]"])


def test_no_recipe_changes_nothing():
    assert layer.apply(["peft=none"], "config") == layer.Layered(["peft=none"], "config")
    assert layer.apply(["recipe.name=null"], "config").config_name == "config"


def gpus(recipe: str) -> int:
    """The number of GPUs that a recipe's name states."""
    return int(re.search(r"_(\d+)gpu_", recipe)[1])


def ours() -> list:
    """The recipes of our families; nightly but for the smallest and the largest of each family and method."""
    alike: dict[str, list[str]] = {}
    for name in TEXT:
        if FAMILIES.match(name) and name not in UNUSABLE:
            family = re.match(r"[a-z]+\d+", name)[0]
            alike.setdefault(f"{family} {'_sft_' in name} {'_a' in name}", []).append(name)
    params = []
    for names in alike.values():
        shown = min(names, key=gpus), max(names, key=gpus)
        for name in names:
            marks = [] if name in shown else [pytest.mark.nightly]
            params.append(pytest.param(name, marks=marks))
    return params


@pytest.mark.parametrize("name", ours())
def test_every_recipe_of_our_families_passes_the_checks(cached, name):
    local = min(8, gpus(name))
    cfg = compose([f"recipe.name={name}", f"launch.nnodes={gpus(name) // local}", "launch.master_port=20000"])
    checks.check(cfg, local)
    assert cfg.model.architecture is not None
    assert (cfg.peft._target_ is None) == ("_sft_" in name)


@pytest.mark.parametrize("name", [name for name in TEXT if not FAMILIES.match(name) or name in UNUSABLE])
def test_every_other_recipe_gives_its_settings_or_says_why_not(cached, name):
    recipe = catalog.find(name)
    if name in UNUSABLE:
        with pytest.raises(UserError, match=UNUSABLE[name]):
            translate_recipe(name, resolve.resolve_recipe(recipe))
        return
    found = resolve.resolve_recipe(recipe)
    with pytest.raises(UserError, match=f"model.path={found['hub']}"):
        translate_recipe(name, found)
    done = translate_recipe(name, found, model_chosen=True)
    assert done.values["trainer.global_batch_size"] >= 1 and done.values["optimizer.lr"] > 0


def test_nothing_is_dropped_silently(cached):
    """Each setting that is not Megatron-Bridge's default is a value, decided here, or listed as left out."""
    for name in TEXT:
        if name in UNUSABLE:
            continue
        found = resolve.resolve_recipe(catalog.find(name))
        done = translate_recipe(name, found, model_chosen=True)
        listed = {line.partition("=")[0] for line in done.left_out} | set(done.decided)
        words = layer_words()
        for section, content in found["sections"].items():
            for key in content["changed"]:
                passed = f"trainer.megatron.{section}.{key}" in done.values
                known = (section, key) in words or content["values"][key] is None or section == "dataset"
                assert passed or known or f"{section}.{key}" in listed, f"{name}: {section}.{key}"
                # What is passed through must be there to be set.
                assert not (passed and key in content["strays"]), f"{name}: {section}.{key}"


def test_moments_in_bf16_are_said_with_what_has_them_here(cached):
    """Twice the memory of the optimizer's state is needed without."""
    saying = set()
    for name in set(TEXT) - set(UNUSABLE):
        found = resolve.resolve_recipe(catalog.find(name))
        left_out = "\n".join(translate_recipe(name, found, model_chosen=True).left_out)
        is_bf16 = "bfloat16" in str(found["sections"]["optimizer"]["values"]["exp_avg_dtype"])
        assert is_bf16 == ("unless optimizer=adam_bf16 is chosen" in left_out), name
        if is_bf16:
            saying.add(name)
    assert saying


def layer_words() -> set[tuple[str, str]]:
    """(section, key) of all that has a key of its own here."""
    from posttrain.recipes.translate import KEYS, TOGETHER

    return {(section, key) for table in (KEYS, TOGETHER) for section, keys in table.items() for key in keys}


def check_page(name, capsys):
    """What `python -m posttrain.recipes NAME` prints composes to the same configuration as the recipe."""
    show_recipe(name)
    page = capsys.readouterr().out
    words = [line for line in page.splitlines() if re.match(r"\+?[a-z_.0-9]+=", line)]
    OverridesParser.create().parse_overrides(words)
    model = [] if any(word.startswith("model=") for word in words) else ["model=llama32_1b"]
    assert ("conf/model does not have" in page) == bool(model)
    typed, layered = compose([*words, *model]), compose([f"recipe={name}", *model])
    layered.recipe.name = None
    assert typed == layered, name


def test_the_page_of_a_recipe_is_words_for_the_command_line(cached, capsys):
    check_page("qwen3_30b_a3b_sft_16gpu_h100_bf16_config", capsys)
    check_page("gemma3_1b_peft_1gpu_h100_bf16_config", capsys)


@pytest.mark.nightly
@pytest.mark.parametrize("name", [name for name in TEXT if name not in UNUSABLE])
def test_the_page_of_every_recipe_is(name, cached, capsys):
    check_page(name, capsys)


def test_the_command_shows_the_resolved_result(cached):
    done = subprocess.run(
        [sys.executable, "-m", "posttrain", f"recipe={PEFT}", "peft.rank=8", "--cfg", "job"],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0
    assert OmegaConf.create(done.stdout).peft.rank == 8
    assert "model=llama32_1b peft=lora" in done.stderr and "dataset squad" in done.stderr


def test_the_numbers_of_the_documentation():
    ours = [name for name in TEXT if FAMILIES.match(name) and name not in UNUSABLE]
    others = [name for name in TEXT if not FAMILIES.match(name) and name not in UNUSABLE]
    text = " ".join((ROOT / "docs" / "recipes.md").read_text().split())
    assert f"has {len(catalog.recipes())} recipes for SFT and PEFT, {len(TEXT)} of them for models of text" in text
    for number, words in (
        (len(ours), "train models in"),
        (len(others), "train models that"),
        (len(UNUSABLE), "can't be"),
    ):
        assert f"**{number}** {words}" in text
