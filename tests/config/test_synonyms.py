"""Names of other frameworks lead to ours, and nothing leads to a wrong one."""

import ast
import importlib.util
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from posttrain.config import synonyms
from posttrain.config.composition import CONF_DIR, compose, key_paths
from posttrain.errors import UserError


def refusal(*overrides):
    with pytest.raises(UserError) as error:
        compose(list(overrides))
    assert "\n" not in str(error.value)
    return str(error.value)


def roots(overrides):
    return {key.partition(".")[0] for key in overrides}


def test_every_counterpart_composes():
    batches = []  # (overrides by key, groups that are chosen in it): composing takes most of a second
    for counterpart in synonyms.TABLE:
        overrides = dict(override.split("=", 1) for override in counterpart.overrides.split())
        chosen = roots(overrides) if any("." not in key for key in overrides) else set()
        for batch, groups in batches:
            if not batch.keys() & overrides.keys() and not groups & chosen:
                break
        else:
            batch, groups = {}, set()
            batches.append((batch, groups))
        batch |= overrides
        groups |= chosen
    assert len(batches) < 20
    for batch, _ in batches:
        cfg = compose([f"{key}={value}" for key, value in batch.items()], with_hydra=True)
        for key, value in batch.items():
            if "." in key:
                assert OmegaConf.select(cfg, key) == OmegaConf.create(f"value: {value}").value, key


def test_every_choice_of_a_counterpart_is_a_file():
    for counterpart in synonyms.TABLE:
        for override in counterpart.overrides.split():
            key, _, value = override.partition("=")
            if (CONF_DIR / key).is_dir():
                assert (CONF_DIR / key / f"{value}.yaml").is_file(), override


def test_no_key_of_ours_is_in_the_table():
    tails = {path for path in key_paths(compose(["logger=[wandb,tensorboard]"]))}
    for name in synonyms.COUNTERPARTS:
        group, is_choice, choice = name.partition("=")
        if is_choice:
            assert not (CONF_DIR / group / f"{choice}.yaml").exists(), name
        else:
            assert name not in tails, name
    assert len(synonyms.COUNTERPARTS) == sum(len(counterpart.names) for counterpart in synonyms.TABLE), "told twice"


THEIRS = {
    ("transformers", "training_args.py", "TrainingArguments"): {
        "learning_rate": "optimizer.lr",
        "warmup_steps": "scheduler.lr_warmup_iters",
        "save_steps": "checkpoint.save_interval",
        "eval_steps": "trainer.validation_interval",
        "gradient_accumulation_steps": "trainer.global_batch_size",
        "per_device_train_batch_size": "trainer.micro_batch_size",
        "output_dir": "hydra.run.dir",
        "num_train_epochs": "trainer.epochs",
        "max_grad_norm": "optimizer.clip_grad",
        "adam_epsilon": "optimizer.adam_eps",
        "lr_scheduler_type": "scheduler",
        "report_to": "logger",
        "logging_steps": "trainer.log_interval",
        "gradient_checkpointing": "trainer.recompute",
        "dataloader_num_workers": "trainer.num_workers",
        "run_name": "run.name",
    },
    ("peft", "tuners/lora/config.py", "LoraConfig"): {
        "r": "peft.rank",
        "lora_alpha": "peft.alpha",
        "lora_dropout": "peft.dropout",
        "use_rslora": "peft.rslora",
        "use_dora": "peft",
    },
}


@pytest.mark.parametrize("package, file, name", THEIRS)
def test_names_of_transformers_and_peft_are_theirs(package, file, name):
    (folder,) = importlib.util.find_spec(package).submodule_search_locations
    tree = ast.parse(Path(folder, file).read_text())  # importing them takes long
    (arguments,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    fields = {node.target.id for node in arguments.body if isinstance(node, ast.AnnAssign)}
    for theirs, ours in THEIRS[package, file, name].items():
        assert theirs in fields
        assert synonyms.advice_on_key(f"training.{theirs}").startswith(f"; here it is `{ours}="), theirs


@pytest.mark.parametrize(
    "override, expected",
    [
        ("learning_rate=2e-5", "`learning_rate`: unknown key; here it is `optimizer.lr=2e-5`"),
        (
            "trainer.save_steps=5",
            "`trainer.save_steps`: unknown key; here it is `checkpoint.save_interval=500` (steps)",
        ),
        ("++trainer.args.lora_r=5", "`trainer.args`: unknown key."),
        ("gradient_accumulation_steps=8", "here it is `trainer.global_batch_size=32` (packed sequences of a step"),
        ("load_in_4bit=true", "there are no weights in 4 bits"),
        ("hydra/launcher=joblib", "here it is `hydra/launcher=local sweep.parallel=4`"),
        (
            "logger=csv,tensorboard",
            "--multirun tries one after the other; a list of them is 'logger=[csv,tensorboard]'",
        ),
        ("trainer.steps=5", "here it is `trainer.max_steps=1000`"),
        ("data.file=a.json", "here it is `data=alpaca data.path=my.json`"),
        ("launch.nproc=2", "here it is `parallelism.nproc_per_node=8`"),
        ("trainer.lr=1e-4", "did you mean `optimizer.lr`?"),
        ("max_steps=5", "did you mean `trainer.max_steps`?"),
        ("precision=fp16", "there is no fp16; take precision=bf16"),
        ("precision=16", "`precision=16`: there is no such choice; there is no fp16; take precision=bf16"),
        ("optimizer=0.1", "`optimizer=0.1`: there is no such choice. Choices: adam, adam_bf16, sgd"),
        ("model_type=llama", "`model_type`: unknown key; not needed: the model's and the tokenizer's own files say it"),
    ],
)
def test_their_names_are_answered_with_ours(override, expected):
    assert expected in refusal(override)


@pytest.mark.parametrize("override", ["trainer.frobnicate=1", "trainer.seed=3"])
def test_no_hint_rather_than_a_wrong_one(override):
    key = override.partition("=")[0]
    assert refusal(override) == f"`{key}`: unknown key. All keys of trainer: python -m posttrain options trainer"


@pytest.mark.parametrize("override", ["+trainer.foo=1", "++trainer.foo=1", "+foo.bar=1", "+hydra.foo=1"])
def test_an_added_key_is_unknown_as_any_other(override):
    key = override.lstrip("+").partition("=")[0].removesuffix(".bar")
    where = "All keys: python -m posttrain --cfg job"
    if key.startswith("trainer."):
        where = "All keys of trainer: python -m posttrain options trainer"
    assert refusal(override) == f"`{key}`: unknown key. {where}"


def test_a_key_of_the_launcher_names_it():
    said = refusal("hydra.launcher.time=60")
    assert "it belongs to hydra/launcher=slurm, to be chosen first" in said
    said = refusal("launch.submit=true", "hydra/launcher=slurm", "hydra.launcher.partion=gpu")
    assert "did you mean `hydra.launcher.partition`? All keys of hydra/launcher: " in said


def test_a_key_of_another_choice_names_it():
    said = refusal("data.format.prompt=question")
    assert "it belongs to data=custom and data=prompt_completion" in said and "`data: custom`" in said
    assert compose(["data=custom", "data.format.prompt=question"]).data.format.prompt == "question"


def test_what_takes_any_key_still_does():
    added = ["+trainer.megatron.model.init_method_std=0.5", "+model.architecture.foo=3", "++trainer.max_steps=3"]
    assert compose(added).trainer.megatron.model.init_method_std == 0.5


def test_the_page_has_the_table():
    page = CONF_DIR.parent / "docs" / "names.md"
    assert synonyms.table() in page.read_text()
