"""Configurations of Primus become experiments that compose, pass the checks, and say what the file said."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from posttrain.cli.command import compose
from posttrain.errors import UserError
from posttrain.primus.__main__ import import_config
from posttrain.primus.read import read_primus
from posttrain.primus.translate import translate_primus
from posttrain.spec import checks

ROOT = Path(__file__).resolve().parents[2]
# Lists of ten aliases each, eight levels: a hundred million values in nine lines.
BOMB = "a0: &a0 [1]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9))

SECTIONS = """
framework: megatron_bridge
task: posttrain
convert_from_hf: true
hf_model_name_or_path: meta-llama/Llama-3-8B
lora:
  use_lora: true
  lora_rank: 24
  lora_alpha: 12
  lora_dropout: 0.1
  lora_target_modules: [q_proj, v_proj]
training:
  micro_batch_size: 2
  global_batch_size: 32
  train_iters: ${STEPS:700}
  lr: 3e-4
  min_lr: 3.0e-5
  lr_decay_style: linear
  lr_warmup_iters: 40
  weight_decay: 0.02
  clip_grad: 0.5
  adam_beta2: 0.98
  seed: 77
precision: {bf16: true, fp16: false}
parallelism: {tensor_model_parallel_size: 2, sequence_parallel: true}
data:
  data_path: ${FOLDER}/rows.json
  dataset_format: alpaca
  split: "80,15,5"
  seq_length: 1024
  prompt_template: alpaca
  chat_format: chatml
  tokenizer_type: SentencePiece
checkpointing: {save: runs/one, save_interval: 100, no_save_optim: true, save_lora_only: true, load: /checkpoints/x}
logging: {log_interval: 5, eval_interval: 50, eval_iters: 4, tensorboard_dir: /tb, wandb_project: mine}
convert_to_hf: true
hf_save_path: /exports/x
hub_token: secret
"""
SECTIONS_MEAN = {
    "model.path": "meta-llama/Meta-Llama-3-8B", "peft._target_": "posttrain.peft.LoRA", "peft.rank": 24,
    "peft.alpha": 12, "peft.dropout": 0.1, "peft.target_modules": ["q_proj", "v_proj"], "trainer.micro_batch_size": 2,
    "trainer.global_batch_size": 32, "trainer.max_steps": 700, "optimizer.lr": 3e-4, "optimizer.min_lr": 3e-5,
    "scheduler.lr_decay_style": "linear", "scheduler.lr_warmup_iters": 40, "scheduler.lr_warmup_fraction": None,
    "optimizer.weight_decay": 0.02, "optimizer.clip_grad": 0.5, "optimizer.adam_beta2": 0.98, "seed": 77,
    "precision.name": "bf16", "parallelism.tensor_model_parallel_size": 2, "parallelism.sequence_parallel": True,
    "data.format._target_": "posttrain.data.formats.Alpaca", "data.validation_fraction": 0.15,
    "trainer.seq_length": 1024, "template.name": "alpaca", "checkpoint.save_interval": 100,
    "checkpoint.save_optimizer": False, "trainer.log_interval": 5, "trainer.validation_interval": 50,
    "trainer.validation_batches": 4, "logger.wandb.project": "mine", "trainer.export": True,
}  # fmt: skip
SECTIONS_LACK = [
    "checkpointing.load=/checkpoints/x: a Megatron checkpoint", "hf_save_path=/exports/x", "data.tokenizer_type",
    "data.chat_format=chatml: the template is alpaca", "data.split=80,15,5: its third part", "logging.tensorboard_dir",
    "hub_token=...: no counterpart", "packed_sequence is not set",
]  # fmt: skip

MODULES = """
work_group: ${TEAM:amd}
workspace: ${WORKSPACE:./output}
modules:
  post_trainer:
    framework: megatron_bridge
    config: sft_trainer.yaml
    model: qwen3_30B_A3B_lora.yaml
    overrides:
      tensor_model_parallel_size: 1
      expert_model_parallel_size: ${EXPERTS:4}
      expert_tensor_parallel_size: 1
      virtual_pipeline_model_parallel_size: null
      sequence_parallel: false
      peft: lora
      peft_dim: 8
      peft_alpha: 16
      packed_sequence: true
      train_iters: 200
      global_batch_size: ${BATCH:128}
      micro_batch_size: 1
      seq_length: 2048
      eval_interval: 30
      save_interval: null
      finetune_lr: 1.0e-4
      exp_avg_dtype: bf16
      lr_warmup_iters: 50
      lr_decay_iters: null
      precision_config: bf16_with_fp8_hybrid
      recompute_granularity: full
      recompute_method: block
      recompute_num_layers: 3
      moe_aux_loss_coeff: 0.01
      moe_router_force_load_balancing: true
      cross_entropy_loss_fusion: true
      use_turbo_attention: true
      wandb_project: null
      dataset:
        dataset_name: databricks/databricks-dolly-15k
        do_validation: true
        val_proportion: 0.1
"""
MODULES_MEAN = {
    "model.path": "Qwen/Qwen3-30B-A3B", "peft.rank": 8, "peft.alpha": 16, "trainer.max_steps": 200,
    "parallelism.expert_model_parallel_size": 4, "trainer.megatron.model.expert_tensor_parallel_size": 1,
    "trainer.global_batch_size": 128, "optimizer.lr": 1e-4, "scheduler.lr_warmup_iters": 50, "precision.name": "fp8",
    "trainer.recompute": "full", "trainer.recompute_layers": 3, "trainer.megatron.model.moe_aux_loss_coeff": 0.01,
    "data.path": "hf://databricks/databricks-dolly-15k", "data.packing": True, "data.validation_fraction": 0.1,
    "data.format._target_": "posttrain.data.formats.Dolly", "checkpoint.save_interval": None,
}  # fmt: skip
MODULES_LACK = [
    "fp8 is scaled per tensor", "moe_router_force_load_balancing=True: sends tokens to experts at random",
    "cross_entropy_loss_fusion=True: decided by posttrain", "use_turbo_attention=True: kernels for AMD GPUs",
    "exp_avg_dtype=bf16: moments are in fp32 unless optimizer=adam_bf16 is chosen",
]  # fmt: skip
FORMS = [(SECTIONS, SECTIONS_MEAN, SECTIONS_LACK), (MODULES, MODULES_MEAN, MODULES_LACK)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with data, in which the command is typed."""
    (tmp_path / "rows.json").write_text(json.dumps([{"instruction": "say", "input": "", "output": "hello"}]))
    monkeypatch.setenv("FOLDER", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(folder: Path, text: str, name: str = "theirs.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


@pytest.mark.parametrize("text, means, lacks", FORMS, ids=["sections", "modules"])
def test_both_forms(folder, text, means, lacks):
    told = import_config([str(write(folder, text)), "--config-dir", "mine"])
    cfg = compose(["experiment=theirs", f"hydra.searchpath=[file://{folder / 'mine'}]"])
    for key, value in means.items():
        assert OmegaConf.select(cfg, key) == value, key
    experiment = (folder / "mine" / "experiment" / "theirs.yaml").read_text()
    for line in lacks:
        assert line in told and line in experiment
    assert "secret" not in told + experiment
    checks.check(cfg, 8)
    commands = [shlex.split(line) for line in told.splitlines() if line.startswith("  python -m posttrain")]
    assert commands[0][3:6] == ["--config-dir", "mine", "experiment=theirs"]
    assert compose([word for word in commands[1][3:] if not word.startswith("hydra.")]) == cfg
    if "save: " in text:
        assert commands[0][-1] == commands[1][-1] == "hydra.run.dir=runs/one"


def given(words):
    """KEY -> VALUE text of the overrides among the words of a command line, in Hydra's own grammar."""
    parsed = OverridesParser.create().parse_overrides([word for word in words if "=" in word])
    return {override.key_or_group: override.input_line.partition("=")[2] for override in parsed}


def test_its_commands_are_readable_whatever_the_names(folder):
    text = "framework: megatron_bridge\nhf_path: a/b\ncheckpointing: {save: 'runs/mine ü'}"
    told = import_config([str(write(folder, text, "größer.yaml"))])
    commands = [shlex.split(line)[3:] for line in told.splitlines() if line.startswith("  python -m posttrain")]
    found = [given(command) for command in commands]
    assert [command["hydra.run.dir"] for command in found] == ["'runs/mine ü'"] * 2
    assert found[0]["experiment"] == "'größer'"


def test_every_line_of_a_file_is_used_or_named(folder):
    """Change each setting in turn: the experiment or the report must change with it."""
    for text, *_ in FORMS:
        path = write(folder, text)
        before = import_config([str(path), "out=a.yaml", "overwrite=true"]), (folder / "a.yaml").read_text()
        for number, line in enumerate(text.splitlines()):
            found = re.fullmatch(r"( +\w+: )(\d+|true|[\d.]+e-\d+)", line)
            if not found or found[1].strip() in ("use_lora:", "save_lora_only:", "do_validation:"):
                continue
            other = {"true": "false"}.get(found[2]) or str(yaml.safe_load(found[2]) or 0) + "1"
            lines = text.splitlines()
            lines[number] = found[1] + other
            write(folder, "\n".join(lines))
            try:
                after = import_config([str(path), "out=a.yaml", "overwrite=true"]), (folder / "a.yaml").read_text()
            except UserError as error:
                after = str(error)
            assert after != before, line


# Each loses against another setting, or has no effect beside it.
LOSERS = """
framework: megatron_bridge
exp_name: mine
recipe: llama.llama3
flavor: llama3_8b
hf_path: meta-llama/Meta-Llama-3-8B
hf_model_path: some/other
peft: none
use_lora: true
lora_rank: 24
lora_alpha: 12
training:
  lr: 3e-4
  finetune_lr: 1e-5
  seed: 1
  lr_warmup_iters: 40
  lr_warmup_fraction: 0.1
  train_iters: 10
  train_iters: 20
  sequence_parallel: true
  recompute_activations: true
  recompute_method: block
  recompute_num_layers: 2
  stage: pretrain
model: {seed: 2}
precision: {fp16: true, bf16: true, fp8: hybrid, precision_config: fp32}
data:
  data_path: rows.json
  data_paths: others.json
  dataset_format: alpaca
  dataset: {dataset_name: tatsu-lab/alpaca, path_or_dataset: other/one, val_proportion: 0.1, num_workers: 3}
  dataset_name: databricks/databricks-dolly-15k
  valid_data_path: v.json
  split: "90,10,0"
  packed_sequence: true
logging: {wandb_entity: us}
"""
LOST = [
    "training.lr=0.0003: training.finetune_lr is used",
    "training.seed=1: model.seed is used",
    "training.train_iters=10: the last one is used",
    "lora_rank=24: all weights are trained (peft: none)",
    "lora_alpha=12: all weights are trained (peft: none)",
    "use_lora=True: peft=none is used",
    "hf_model_path=some/other: hf_path is used",
    "training.lr_warmup_iters=40: training.lr_warmup_fraction is used",
    "training.sequence_parallel=True: has no effect without tensor parallelism",
    "training.recompute_method=block: goes with recompute_granularity: full",
    "training.recompute_num_layers=2: goes with recompute_granularity: full",
    "precision.fp16=True: precision.precision_config is used",
    "precision.bf16=True: precision.precision_config is used",
    "precision.fp8=hybrid: precision.precision_config is used",
    "data.data_path=rows.json: the data set databricks/databricks-dolly-15k is used",
    "data.data_paths=others.json: data.data_path is used",
    "data.dataset: tatsu-lab/alpaca: databricks/databricks-dolly-15k is used",
    "data.dataset: other/one: databricks/databricks-dolly-15k is used",
    "data.dataset.num_workers=3: no counterpart",
    "data.dataset.val_proportion=0.1: data.valid_data_path is used",
    "data.split=90,10,0: data.valid_data_path is used",
    "logging.wandb_entity=us: to whom a run is sent",
    "exp_name=mine: no counterpart",
    "recipe=llama.llama3: its values are not in this file",
    "training.stage=pretrain: no counterpart",
]


def test_what_loses_is_listed(folder):
    told = import_config([str(write(folder, LOSERS)), "out=a.yaml"])
    for line in LOST:
        assert f"  {line}" in told
    written = OmegaConf.load(folder / "a.yaml")
    assert (written.optimizer.lr, written.seed, written.trainer.max_steps) == (1e-5, 2, 20)


def test_no_loser_can_be_taken_out_unnoticed(folder):
    """Without any one line the translation is another one, or tells less."""
    whole = translate_primus(read_primus(write(folder, LOSERS)))
    lines = LOSERS.splitlines()
    for number, line in enumerate(lines):
        found = re.fullmatch(r" *(\w+): (?!null|false|\{|&)(\S.*)", line)
        if not found or found[1] == "framework":
            continue
        write(folder, "\n".join(lines[:number] + lines[number + 1 :]))
        try:
            assert translate_primus(read_primus(folder / "theirs.yaml")) != whole, line
        except UserError:
            continue


def test_a_preset_may_be_overridden(folder):
    """The file's own values win over those of the model's preset, as they are there for; nothing is said."""
    preset = folder / "primus/configs/models/megatron_bridge/mine.yaml"
    preset.parent.mkdir(parents=True)
    preset.write_text("hf_path: Qwen/Qwen3-8B\nseq_length: 4096\n")
    text = "modules: {post_trainer: {framework: megatron_bridge, model: mine.yaml, overrides: {seq_length: 128}}}"
    done = translate_primus(read_primus(write(folder, text)))
    assert done.values["trainer.seq_length"] == 128
    assert done.left_out == ["no data are set; choose data= and data.path="]
    other = text.replace("modules: {", "modules: {pre_trainer: {framework: megatron}, ")
    assert (
        "modules.pre_trainer: only modules.post_trainer is imported"
        in translate_primus(read_primus(write(folder, other))).left_out
    )


def test_the_environment_wins_over_a_default(folder, monkeypatch):
    monkeypatch.setenv("STEPS", "12")
    import_config([str(write(folder, SECTIONS)), "out=a.yaml"])
    assert OmegaConf.load(folder / "a.yaml").trainer.max_steps == 12


def test_words_fill_what_the_file_does_not_say(folder):
    path = write(folder, "framework: megatron_bridge\nmodel: {load: /checkpoints/x}\ntraining: {lr: 1e-5}\n")
    with pytest.raises(UserError, match="add model=NAME"):
        import_config([str(path)])
    told = import_config([str(path), "model=llama3_8b", "data=alpaca", "data.path=rows.json", "optimizer.lr=2e-5"])
    assert "experiment=theirs model=llama3_8b data=alpaca data.path=rows.json optimizer.lr=2e-5" in told
    assert "model.load=/checkpoints/x: a Megatron checkpoint" in told and "checked: it composes and passes" in told


def test_a_checkout_of_primus_says_what_its_models_are(folder):
    models = folder / "primus" / "configs" / "models" / "megatron_bridge"
    models.mkdir(parents=True)
    (models / "ours.yaml").write_text("recipe: qwen.qwen3\nflavor: f\nhf_path: Qwen/Qwen3-8B\n")
    examples = folder / "examples"
    examples.mkdir()
    path = write(examples, MODULES.replace("qwen3_30B_A3B_lora", "ours").replace("${EXPERTS:4}", "1"))
    told = import_config([str(path)])
    assert "model=qwen3_8b" in told and "add recipe=qwen3_8b_peft_config" in told


def test_blocks_beside_the_modules(folder):
    """Primus merges them into the configuration of Megatron-Bridge, whose words for LoRA are short."""
    text = MODULES.replace("      peft_dim: 8\n      peft_alpha: 16\n", "").partition("      dataset:")[0]
    text += "      dataset_name: tatsu-lab/alpaca\npeft: {dim: 4, alpha: 2, dropout: 0.2}\n"
    import_config([str(write(folder, text)), "out=a.yaml"])
    experiment = OmegaConf.load(folder / "a.yaml")
    assert experiment.peft == {"rank": 4, "alpha": 2, "dropout": 0.2}
    assert experiment.data.path == "hf://tatsu-lab/alpaca"


def test_a_file_is_not_replaced_unasked(folder):
    path = write(folder, SECTIONS)
    import_config([str(path)])
    with pytest.raises(UserError, match="overwrite=true"):
        import_config([str(path)])
    import_config([str(path), "overwrite=true"])
    with pytest.raises(UserError, match=r"out=/proc/x/a\.yaml: nothing can be written in /proc .*; choose another"):
        import_config([str(path), "out=/proc/x/a.yaml"])


@pytest.mark.parametrize(
    "text, message",
    [
        ("framework: torchtitan", "framework=torchtitan"),
        ("a: [", "not valid YAML"),
        ("- a", "a mapping was expected"),
        (BOMB, "aliases written out"),
        ("framework: megatron_bridge\ntask: pretrain", "task=pretrain"),
        ("modules: {pre_trainer: {framework: megatron_bridge}}", "no modules.post_trainer but pre_trainer"),
        ("modules: {post_trainer: {framework: megatron}}", "framework=megatron"),
        ("post_train: {backend: megatron-bridge}", "names a script"),
        ("framework: megatron_bridge\nhf_path: ${NOWHERE_SET}", "the environment variable NOWHERE_SET"),
        ("framework: megatron_bridge\nhf_path: a/b\ntraining: {train_iters: many}", "trainer.max_steps"),
        ("framework: megatron_bridge\nhf_path: a/b\ntraining: {optimizer: lion}", "optimizer=lion"),
        ("framework: megatron_bridge\nhf_path: a/b\npeft: prefix", "peft=prefix"),
        ("framework: megatron_bridge\nhf_path: a/b\ndata: {data_path: x, dataset_format: dolly, split: a}", "split=a:"),
        ("modules: {post_trainer: {framework: megatron_bridge, model: grok.yaml}}", "`grok` is not in conf/model"),
        ("modules: {post_trainer: {framework: megatron_bridge, overrides: [a]}}", "a mapping was expected"),
    ],
)  # fmt: skip
def test_files_that_cannot_be_taken_over(folder, text, message):
    with pytest.raises(UserError) as error:
        import_config([str(write(folder, text))])
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (folder / "conf").exists()


def test_a_preset_of_the_checkout_is_read_as_the_file_is(folder):
    text = "modules: {post_trainer: {framework: megatron_bridge, model: mine.yaml}}"
    preset = folder / "primus/configs/models/megatron_bridge/mine.yaml"
    preset.parent.mkdir(parents=True)
    preset.write_text("hf_path: Qwen/Qwen3-8B\n")
    assert read_primus(write(folder, text)).settings == {"hf_path": "Qwen/Qwen3-8B"}
    for wrong, message in (
        (BOMB, "aliases written out"),
        ("a: [", "not valid YAML"),
        ("- a", "a mapping was expected"),
    ):
        preset.write_text(wrong)
        with pytest.raises(UserError, match=message):
            read_primus(write(folder, text))


def test_the_command(folder):
    """The commands as typed: exit codes, no traceback, and what it prints runs."""
    command = [sys.executable, "-m", "posttrain.primus"]
    missing = subprocess.run([*command, "no.yaml"], capture_output=True, text=True)
    assert missing.returncode == 2 and "no.yaml: can't be read" in missing.stderr and "Traceback" not in missing.stderr
    write(folder, SECTIONS)
    done = subprocess.run([*command, "theirs.yaml"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if "experiment=theirs" in line)
    words = shlex.split(line)[3:]
    shown = subprocess.run(
        [sys.executable, "-m", "posttrain", *words, "--cfg", "job"], capture_output=True, text=True, cwd=folder
    )
    assert OmegaConf.create(shown.stdout).trainer.max_steps == 700
