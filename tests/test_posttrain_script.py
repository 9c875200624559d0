"""scripts/posttrain.sh: every command's words compose to what it says, and places come from the environment."""

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from posttrain.config.composition import compose

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "posttrain.sh"
OURS = [
    "MODEL", "DATA", "FORMAT", "TEMPLATE", "OUT", "RUN", "GPUS", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT",
    "LRS", "RANKS", "MERGE", "PYTHON",
]  # fmt: skip


def script(*words: str, keys: str = "", **variables: str) -> subprocess.CompletedProcess:
    """Run it with `keys` typed and only these of its variables set."""
    inherited = {k: v for k, v in os.environ.items() if k not in OURS and not k.startswith(("SLURM", "TORCHELASTIC"))}
    return subprocess.run(
        [SCRIPT, *words], input=keys, capture_output=True, text=True, env={**inherited, "PYTHON": "python", **variables}
    )


def dry(*words: str, **variables: str) -> list[str]:
    """The words of the command that it would run, after `python -m MODULE`."""
    done = script(*words, "--dry-run", **variables)
    assert done.returncode == 0, done.stderr
    command = shlex.split(done.stdout)
    assert command[:2] == ["python", "-m"]
    return command[2:]


def composed(words: list[str]):
    assert words[0] == "posttrain"
    return compose([word for word in words[1:] if not word.startswith(("hydra.", "--"))])


@pytest.mark.parametrize(
    "command, target, kind, template",
    [
        ("sft", None, "Alpaca", "alpaca"),
        ("hf", None, "Messages", "model"),
        ("lora", "posttrain.peft.LoRA", "Alpaca", "alpaca"),
        ("chat", "posttrain.peft.LoRA", "Messages", "chatml"),
    ],
)
def test_commands(command, target, kind, template):
    words = dry(command, "trainer.epochs=2", MODEL="some/model", DATA="my rows, it's all.json", OUT="runs/a", GPUS="2")
    cfg = composed(words)
    assert (cfg.model.path, cfg.peft._target_, cfg.template.name) == ("some/model", target, template)
    assert cfg.data.format._target_ == f"posttrain.data.formats.{kind}"
    assert (cfg.data.path, cfg.trainer.epochs, cfg.parallelism.nproc_per_node) == ("my rows, it's all.json", 2, 2)
    assert "hydra.run.dir=runs/a" in words


def test_without_variables_it_is_the_demo():
    assert dry("lora") == ["posttrain", "peft=lora"]
    assert composed(dry("sft")).data.path == "demo:sentences"


def test_models_of_conf_go_by_their_names():
    assert "model=llama3_8b" in dry("lora", MODEL="llama3_8b")
    assert dry("lora", MODEL="./llama3_8b")[1:3] == ["model=hf", "model.path=./llama3_8b"]
    cfg = composed(dry("lora", MODEL="llama3_8b", DATA="a.json", FORMAT="dolly", TEMPLATE="llama3"))
    assert (cfg.model.path, cfg.template.name) == ("meta-llama/Meta-Llama-3-8B", "llama3")


def test_sweep():
    words = dry("sweep", LRS="1e-4,3e-4,5e-4", RANKS="4,8", OUT="sweeps/a")
    assert words[1] == "--multirun" and "hydra.sweep.dir=sweeps/a" in words
    assert words[-2:] == ["optimizer.lr=1e-4,3e-4,5e-4", "peft.rank=4,8"]


def test_export(tmp_path):
    (tmp_path / "adapter").mkdir()
    assert dry("export", RUN=str(tmp_path), OUT="x") == [
        "posttrain.convert", "merge", f"checkpoint={tmp_path}", "convert.out=x",
    ]  # fmt: skip
    for no in ("false", "False", "FALSE", "0", "no", "off", ""):
        assert dry("export", RUN=str(tmp_path), OUT="x", MERGE=no)[1] == "export"
    for yes in ("true", "1", "yes", "On"):
        assert dry("export", RUN=str(tmp_path), OUT="x", MERGE=yes)[1] == "merge"
    done = script("export", "--dry-run", RUN=str(tmp_path), OUT="x", MERGE="perhaps")
    assert done.returncode == 2 and "MERGE=perhaps: true or false" in done.stderr
    assert dry("export", RUN="outputs/other", OUT="x")[1] == "export"


def test_several_machines():
    place = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "node0", "MASTER_PORT": "4000", "OUT": "runs/a"}
    launch = composed(dry("sft", **place)).launch
    assert (launch.nnodes, launch.node_rank, launch.master_addr, launch.master_port) == (2, 1, "node0", 4000)
    assert not any(word.startswith("launch") for word in dry("sft", TORCHELASTIC_RUN_ID="x", **place))


def test_a_task_of_slurm_finds_its_place(tmp_path):
    fake = tmp_path / "scontrol"  # what Slurm's own answers for two nodes
    fake.write_text('#!/bin/sh\n[ "$*" = "show hostnames node[3-4]" ] && printf "node3\\nnode4\\n"\n')
    fake.chmod(0o755)
    slurm = {
        "SLURM_JOB_ID": "12345", "SLURM_NNODES": "2", "SLURM_NODEID": "1", "SLURM_JOB_NODELIST": "node[3-4]",
        "SLURM_NTASKS": "2", "SLURM_LOCALID": "0", "PATH": f"{tmp_path}:{os.environ['PATH']}",
    }  # fmt: skip
    words = dry("lora", SLURM_STEP_ID="0", **slurm)
    launch = composed(words).launch
    assert (launch.nnodes, launch.node_rank, launch.master_addr) == (2, 1, "node3")
    assert launch.master_port == 10000 + 12345 % 20000 and "hydra.run.dir=outputs/slurm-12345" in words
    batch = script("lora", "--dry-run", **slurm)
    assert batch.returncode == 2 and "srun --ntasks-per-node=1" in batch.stderr
    crowded = script("lora", "--dry-run", SLURM_STEP_ID="0", **{**slurm, "SLURM_NTASKS": "16"})
    assert crowded.returncode == 2 and "one task per node" in crowded.stderr
    assert "launch.nnodes=2" not in dry("lora", SLURM_STEP_ID="0", **{**slurm, "SLURM_NNODES": "1"})


def test_the_menu_asks_and_shows_the_command():
    done = script("menu", keys="4\nllama3_8b\nchats.jsonl\n\nllama3\nruns/a\nn\n")
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-1]
    assert last.split("python -m ")[-1] == (
        "posttrain model=llama3_8b peft=lora data=messages data.path=chats.jsonl template=llama3 hydra.run.dir=runs/a"
    )
    assert script("menu", keys="q\n").returncode == 0
    assert script("menu", keys="9\n").returncode == 2


@pytest.mark.parametrize(
    "words, variables, message",
    [
        ([], {}, "usage:"),
        (["train"], {}, "train: no such command"),
        (["sft", "lora"], {}, "one command"),
        (["hf"], {}, "set MODEL"),
        (["export"], {"RUN": "x"}, "set RUN to a run directory and OUT"),
        (["sft"], {"NNODES": "2"}, "set OUT"),
        (["sft"], {"NNODES": "2", "OUT": "x"}, "set MASTER_ADDR"),
        (["sweep"], {"NNODES": "2"}, "sweep:"),
    ],
)
def test_mistakes(words, variables, message):
    done = script(*words, "--dry-run", **variables) if words else script(**variables)
    assert done.returncode == 2 and message in done.stderr and not done.stdout


def test_help_and_options_of_hydra():
    text = script("--help").stdout
    for word in ["sft", "hf", "lora", "chat", "sweep", "export", "menu", *OURS]:
        assert word in text
    assert dry("lora", "--cfg", "job", "~logger")[-3:] == ["--cfg", "job", "~logger"]


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck():
    subprocess.run(["shellcheck", SCRIPT], check=True)
