"""Layouts on GPUs: what is trained is what one GPU trains. `pytest -m gpu tests/e2e/test_gpu_layouts.py -s`.

Small models whose heads are as wide as kernels of GPUs want them, 20 steps from the same weights. Every case is a
command of its own; a few run at a time. Where there are fewer GPUs than a case has processes, each process is a machine
of a run on several, and they share the GPUs: NCCL then talks over sockets, slowly. The figures are printed as rows of a
table, and written to the file that POSTTRAIN_LAYOUTS names (scripts/layout_table.py puts it into docs/parallelism.md).
"""

import itertools
import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import tiny_model
from commands import Result, environment

from posttrain.launch.nodes import reserve_port
from posttrain.utils.gpus import visible_gpus

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(visible_gpus() < 1, reason="needs a GPU"),
]

AT_ONCE = 8  # commands on as many GPUs as one has processes; each spends most of its time starting
SHARED_AT_ONCE = 4  # on GPUs that processes share
STEPS = 20
LOSSES = 1e-3  # in bf16, whose rounding depends on the order of sums
# Each process rounds its half of an adapter's sum, or scales its half of a row to 8 bits, by itself.
COARSER = {("canonical", "tp2"): 3e-3, ("fp8", "tp2"): 4e-3, ("fp8", "tp4"): 4e-3}
TRAINED = {
    "lora": ["peft=lora"],
    "dora": ["peft=dora"],
    "canonical": ["peft=lora", "peft.target_modules=[q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj]"],
    "all": ["peft=none"],
    "fp8": ["peft=lora", "precision=fp8"],
    "all_bf16_adam": ["peft=none", "optimizer=adam_bf16"],
}
DATA = {"messages": ["data=messages"], "text": ["objective=text"]}
RATES = {
    "all": 1e-5,
    "all_bf16_adam": 1e-5,
}  # Adam's steps are of one size, so all weights move far, and differences with them
DENSE = ["ddp", "zero1", "fsdp", "tp2", "pp2"]
MIXTURE = ["ddp", "fsdp", "tp2", "ep2"]


@dataclass(frozen=True)
class Case:
    """A run: of a model, what is trained of it, how it is divided, on what, with which more overrides.

    Context parallelism pads conversations to its multiple and so packs others together; documents of such lengths are
    packed alike.
    """

    model: str
    trained: str
    layout: str
    data: str = "messages"
    processes: int = 2
    more: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        words = [self.model, self.trained, self.layout, self.data, str(self.processes), *self.more]
        return "-".join(words).replace("=", "_")

    @property
    def alone(self) -> "Case":
        return Case(self.model, self.trained, "single", self.data, 1)


@dataclass(frozen=True)
class Resumed:
    """A run of which half of the steps are made in one layout, the rest in another or the same.

    Attributes:
        killed: how the first half ends: a rank is killed between two saves, instead of an end after half of the steps.
    """

    model: str
    trained: str
    first: str
    then: str
    killed: bool = False

    @property
    def name(self) -> str:
        return f"{self.model}-{self.trained}-{self.first}-{self.then}-{'killed' if self.killed else 'ended'}"

    @property
    def alone(self) -> Case:
        return Case(self.model, self.trained, "single", processes=1)


EVERYWHERE = ("lora", "dora", "canonical", "all", "fp8")
CASES = [Case("Llama", trained, layout) for trained in EVERYWHERE for layout in DENSE]
CASES += [Case("Llama", trained, "cp2", "text") for trained in EVERYWHERE]
CASES += [Case("Llama", "all_bf16_adam", layout) for layout in ("ddp", "fsdp", "tp2")]
CASES += [Case("Mixtral", trained, layout) for trained in ("lora", "all") for layout in MIXTURE]
CASES += [Case("Mixtral", "fp8", "ep2")]
CASES += [
    Case("Llama", "lora", "tp2", more=("trainer.num_generations=2",)),
    Case("Llama", "lora", "tp2", more=("trainer.offload_layers=2",)),
    Case("Llama", "lora", "cp2", "text", more=("trainer.offload_layers=2",)),
]
CASES += [Case("Llama", "lora", layout, processes=4) for layout in (*DENSE, "tp4", "tp2_pp2")]
CASES += [Case("Llama", "lora", layout, "text", processes=4) for layout in ("cp2", "cp4")]
CASES += [Case("Llama", "fp8", layout, processes=4) for layout in ("fsdp", "tp4")]
CASES += [Case("Llama", "all", layout, processes=4) for layout in ("zero1", "fsdp", "tp2_pp2")]
CASES += [Case("Mixtral", "lora", layout, processes=4) for layout in ("ep2", "ep4")]
RESUMED = [
    Resumed("Llama", "lora", "tp2", "ddp"),
    Resumed("Llama", "lora", "pp2", "tp2"),
    Resumed("Llama", "lora", "ddp", "single"),
    Resumed("Llama", "lora", "fsdp", "fsdp"),
    Resumed("Llama", "fp8", "fsdp", "fsdp"),
    Resumed("Llama", "all_bf16_adam", "fsdp", "fsdp"),
    Resumed("Llama", "all_bf16_adam", "ddp", "single"),
    Resumed("Mixtral", "lora", "fsdp", "fsdp"),
]
if visible_gpus() > 1:  # a machine whose neighbour dies waits for it for minutes
    RESUMED.append(Resumed("Llama", "lora", "fsdp", "fsdp", killed=True))


def write_model(directory: Path, kind: str) -> None:
    """A random model with the small tokenizer and data."""
    import torch
    import transformers

    tiny_model.write(directory)
    texts = []
    for i in range(400):
        texts.append({"text": f"{i:07d}-" * (1 + i % 6) + "stuvxyz"})  # with its end, a multiple of 8 tokens
    rows = []
    for i in range(400):
        turns = [("user", f"say {i} " + "la " * (i % 5)), ("assistant", f"number {i}, hello world")]
        rows.append({"messages": [{"role": role, "content": text} for role, text in turns]})
    (directory / "messages.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "text.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    config = {
        "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8, "head_dim": 64,
        "num_key_value_heads": 4, "vocab_size": 288, "max_position_embeddings": 512, "bos_token_id": None,
        "tie_word_embeddings": False,
    }  # fmt: skip
    if kind == "Mixtral":
        config |= {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**config))
    model.save_pretrained(directory)


class Bench:
    """Runs commands on the visible GPUs, some at a time.

    Args:
        directory: of models and runs.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(visible_gpus())))
        self.gpus = visible.split(",")
        pairs = len(self.gpus) // 2
        self.pool = ThreadPoolExecutor(pairs * AT_ONCE or SHARED_AT_ONCE)
        self.numbers = itertools.count()

    def directory_of(self, name: str) -> Path:
        return self.directory / "runs" / name

    def run_case(self, case: Case) -> Result:
        return self.run(case, case.name)

    def run_resumed(self, resumed: Resumed) -> tuple[Result, Result]:
        """Run the first part and the whole."""
        first, then = (Case(resumed.model, resumed.trained, layout) for layout in (resumed.first, resumed.then))
        saved = ["checkpoint.save=true", "checkpoint.save_interval=5"]
        if resumed.killed:
            threading.Thread(target=kill_after_save, args=[self.directory_of(resumed.name)], daemon=True).start()
            half = self.run(first, resumed.name, *saved)
        else:
            half = self.run(first, resumed.name, *saved, "trainer.export=false", f"trainer.max_steps={STEPS // 2}")
        return half, self.run(then, resumed.name, *saved)

    def run(self, case: Case, name: str, *overrides: str) -> Result:
        """Run a case to its end."""
        model = self.directory / case.model
        run_dir = self.directory_of(name)
        processes = 1 if case.layout == "single" else case.processes
        words = [
            "model=hf", f"model.path={model}", *DATA[case.data],
            f"data.path={model / case.data}.jsonl", "data.validation_fraction=0.1", "trainer.seq_length=256",
            "trainer.global_batch_size=8", f"trainer.max_steps={STEPS}", "trainer.num_generations=0",
            f"optimizer.lr={RATES.get(case.trained, 1e-4)}", "scheduler=constant", "scheduler.lr_warmup_fraction=0",
            "checkpoint.save=false", *TRAINED[case.trained], f"parallelism={case.layout}",
            *case.more, *overrides, f"hydra.run.dir={run_dir}",
        ]  # fmt: skip
        began = time.monotonic()
        with reserve_port() as held:
            machines = self.machines(processes, held.getsockname()[1])
            first, *others = [self.start([*words, *added], env) for added, env in machines]
            out, err = first.communicate(timeout=600)
            for other in others:
                _, more = other.communicate(timeout=60)
                err += more
        print(f"{name}: exit code {first.returncode} after {time.monotonic() - began:.0f} s", flush=True)
        return Result(first.returncode, out, err, run_dir)

    def machines(self, processes: int, port: int) -> list[tuple[list[str], dict[str, str]]]:
        """Overrides and variables of the command of each machine, emulated or this one."""
        groups = len(self.gpus) // processes
        if groups:
            first = next(self.numbers) % groups * processes
            gpus = ",".join(self.gpus[first : first + processes])
            return [([f"parallelism.nproc_per_node={processes}"], {"CUDA_VISIBLE_DEVICES": gpus})]
        machines = []
        for rank in range(processes):
            overrides = [f"launch.nnodes={processes}", f"launch.node_rank={rank}", f"launch.master_port={port}"]
            gpu = self.gpus[rank % len(self.gpus)]
            # NCCL refuses two processes on a GPU of what it takes for one host.
            env = {"CUDA_VISIBLE_DEVICES": gpu, "NCCL_HOSTID": str(rank), "NCCL_SOCKET_IFNAME": "lo"}
            machines.append(([*overrides, "parallelism.nproc_per_node=1"], env))
        return machines

    def start(self, words: list[str], env: dict[str, str]) -> subprocess.Popen[str]:
        """Start a command."""
        return subprocess.Popen(
            [sys.executable, "-m", "posttrain", *words],
            env=environment(self.directory / "cache") | env,
            cwd=self.directory,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Bench:
    directory = tmp_path_factory.mktemp("layouts")
    for kind in ("Llama", "Mixtral"):
        write_model(directory / kind, kind)
    return Bench(directory)


def selected(request, name: str) -> list:
    """The values of a parameter in the tests that are run."""
    values = []
    for item in request.session.items:
        callspec = getattr(item, "callspec", None)
        if callspec and name in callspec.params:
            values.append(callspec.params[name])
    return values


@pytest.fixture(scope="module")
def results(bench, request) -> dict[str, Result | tuple[Result, Result]]:
    """Every run of the tests that were asked for, and what it is compared with, by its name."""
    cases, resumed = selected(request, "case"), selected(request, "resumed")
    alone = sorted({run.alone for run in [*cases, *resumed]}, key=str)
    futures = {run.name: bench.pool.submit(bench.run_resumed, run) for run in resumed}
    futures |= {run.name: bench.pool.submit(bench.run_case, run) for run in [*alone, *cases]}
    done = {name: future.result() for name, future in futures.items()}
    write_table(done, cases)
    return done


def series(result: Result) -> list[float]:
    return [*result.losses, result.summary["val_loss_before"], result.summary["val_loss_after"]]


def difference(one: Result, other: Result) -> float:
    """The largest relative one between losses."""
    pairs = zip(series(one), series(other), strict=True)
    return max(abs(a - b) / abs(b) for a, b in pairs)


def exported(result: Result) -> dict:
    """Tensors of the adapter or the weights that a run has exported."""
    from safetensors.torch import load_file

    files = [*result.run_dir.glob("adapter/*.safetensors"), *result.run_dir.glob("hf/*.safetensors")]
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def write_table(done: dict[str, Result], cases: list[Case]) -> None:
    """A line of JSON for each case, where POSTTRAIN_LAYOUTS says."""
    rows = []
    for case in cases:
        result, alone = done[case.name], done[case.alone.name]
        off = None
        if result.code == 0 and alone.code == 0:
            off = difference(result, alone)
        captured = "CUDA graph: on" in result.out + result.log()
        rows.append({"model": case.model, "trained": case.trained, "layout": case.layout, "processes": case.processes,
                     "more": case.more, "off": off, "captured": captured})  # fmt: skip
        print(rows[-1])
    if path := os.environ.get("POSTTRAIN_LAYOUTS"):
        Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_one_gpu_trains(case, results):
    """The same losses; every exported tensor moved as one GPU's did, so that no process's part is lost."""
    result, alone = results[case.name], results[case.alone.name]
    for each in (alone, result):
        assert each.code == 0, each.err + each.log()[-3000:]
    assert difference(result, alone) < COARSER.get((case.trained, case.layout), LOSSES)
    same_export(result, alone)


def same_export(result: Result, alone: Result) -> None:
    """Every tensor is there, and each half of it is the other's but for roundings."""
    import torch

    one, other = exported(result), exported(alone)
    assert one.keys() == other.keys() and one
    for name, right in other.items():
        found = one[name].float()
        assert found.shape == right.shape
        rows = found.flatten(1) if found.dim() > 1 else found[None]
        right_rows = right.float().flatten(1) if right.dim() > 1 else right.float()[None]
        # Adam's first steps are of one size whatever the gradient's, so single elements differ; parts may not.
        for part, expected in zip(rows.chunk(2), right_rows.chunk(2), strict=True):
            assert torch.linalg.norm(part - expected) <= 0.35 * torch.linalg.norm(expected), name


@pytest.mark.parametrize("resumed", RESUMED, ids=lambda resumed: resumed.name)
def test_resumed(resumed, results):
    """One GPU's losses and export, though the run ended in between, or a rank was killed."""
    half, whole = results[resumed.name]
    alone = results[resumed.alone.name]
    assert (half.code != 0) == resumed.killed, half.err + half.log()[-3000:]
    for each in (alone, whole):
        assert each.code == 0, each.err + each.log()[-3000:]
    assert "resuming after step" in whole.out
    losses = {line["step"]: line["loss"] for line in whole.metrics if "loss" in line}
    assert list(losses.values()) == pytest.approx(alone.losses, rel=LOSSES)
    same_export(whole, alone)


def kill_after_save(run_dir: Path) -> None:
    """SIGKILL to the second rank of a run as soon as it has saved."""
    while not (run_dir / "checkpoints" / "iter_0000005").exists():
        time.sleep(0.02)
    for process in psutil.process_iter(["cmdline"]):
        if str(run_dir) in " ".join(process.info["cmdline"] or []) and process.environ().get("RANK") == "1":
            process.kill()
