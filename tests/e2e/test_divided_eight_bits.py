"""LoRA on a base in 8 bits that Megatron-FSDP divides: what one process trains, in half of its memory for the base.

The command refuses `precision=fp8` on a CPU, see eight_bit_worker.py.
"""

import json
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from commands import Result
from ranks import run_ranks
from safetensors.torch import load_file
from torch.distributed.checkpoint.filesystem import FileSystemReader

from posttrain.launch.nodes import reserve_port

pytestmark = pytest.mark.nightly
WORKER = Path(__file__).with_name("eight_bit_worker.py")
STEPS = 4
MATRICES = 4 * (32 * 64 + 32 * 32 + 3 * 32 * 64)  # numbers of the tiny model's layers


def runs_of(case: str, directory: Path) -> list[tuple[str, list[str]]]:
    """The directories and overrides of a case's runs, one after the other."""
    if case == "random":
        return [(case, ["model.random_init=true"])]
    if case == "continued":  # from an adapter
        return [(case, [f"model.path={directory / '1-files' / 'adapter'}"])]
    if case == "resumed":
        return [(case, [f"trainer.max_steps={STEPS // 2}"]), (case, [])]
    return [(case, [])]


def run_all(world: int, cases: list[str], words: list[str], directory: Path) -> dict[str, Result]:
    """Run cases on `world` processes; the last run of each."""
    runs, results = [], {}
    with ExitStack() as ports:
        for case in cases:
            for folder, more in runs_of(case, directory):
                run_dir = directory / f"{world}-{folder}"
                port = ports.enter_context(reserve_port()).getsockname()[1]
                runs.append({"directory": str(run_dir), "overrides": [*words, *more], "port": port})
            results[case] = Result(0, "", "", run_dir)
        file = directory / f"runs-{world}"
        file.write_text(json.dumps(runs), encoding="utf-8")
        run_ranks(WORKER, [[str(file), str(rank), str(world)] for rank in range(world)], directory, 500)
    return results


@pytest.fixture(scope="module")
def results(tiny, selected, tmp_path_factory) -> tuple[dict[str, Result], dict[str, Result]]:
    """Of one process, and of two under Megatron-FSDP: `files` and the cases of the tests that are run."""
    directory = tmp_path_factory.mktemp("eight")
    words = [
        "model=hf", f"model.path={tiny}", "data=messages", f"data.path={tiny / 'data.jsonl'}",
        "data.validation_fraction=0.1", "trainer.seq_length=128", "trainer.global_batch_size=4",
        f"trainer.max_steps={STEPS}", "trainer.num_generations=1", "trainer.max_new_tokens=8", "optimizer.lr=1e-2",
        "scheduler=constant", "peft=lora", "precision=fp8", f"cache_dir={directory / 'cache'}",
    ]  # fmt: skip
    cases = list(dict.fromkeys(["files", *(params["case"] for params in selected)]))
    alone = run_all(1, [case for case in cases if case != "resumed"], words, directory)
    return alone, run_all(2, cases, [*words, "parallelism=fsdp", "parallelism.nproc_per_node=2"], directory)


def series(result: Result) -> list[float]:
    return [*result.losses, result.summary["val_loss_before"], result.summary["val_loss_after"]]


@pytest.mark.parametrize("case", [pytest.param("files", marks=pytest.mark.every_run), "random", "continued"])
def test_what_one_process_trains(case, results):
    """The losses and the exported adapter, whichever the base and the start are."""
    alone, divided = (result[case] for result in results)
    assert series(divided) == pytest.approx(series(alone), rel=1e-4)
    adapters = [load_file(result.run_dir / "adapter" / "adapter_model.safetensors") for result in (alone, divided)]
    assert adapters[0].keys() == adapters[1].keys()
    for name, right in adapters[0].items():
        # Adam's first steps are of one size whatever the gradient's; a few elements near zero go the other way.
        assert torch.linalg.norm(adapters[1][name] - right) <= 0.1 * torch.linalg.norm(right), name


@pytest.mark.parametrize("case", ["resumed"])
def test_resumed(case, results):
    """The whole run, bit for bit."""
    _, divided = results
    assert divided[case].losses == divided["files"].losses
    assert divided[case].summary["val_loss_after"] == divided["files"].summary["val_loss_after"]


@pytest.mark.every_run
@pytest.mark.parametrize("case", ["files"])
def test_checkpoints_have_the_adapter_alone(case, results):
    _, divided = results
    saved = FileSystemReader(divided[case].run_dir / "checkpoints" / f"iter_{STEPS:07d}").read_metadata()
    weights = [name for name in saved.state_dict_metadata if name.startswith("model")]
    assert weights and all(".adapter." in name for name in weights)


@pytest.mark.every_run
@pytest.mark.parametrize("case", ["files"])
def test_each_process_holds_its_half_of_the_base(case, results):
    """Nothing of it is there before it is divided, and none of a layer that was gathered is left."""
    alone, divided = (result[case].run_dir for result in results)
    assert held(alone, 0) == {"after": MATRICES}
    halves = [held(divided, rank) for rank in range(2)]
    assert sum(half["after"] for half in halves) == MATRICES
    for half in halves:
        assert half["before"] == 2 * 16  # a zero for each matrix
        assert half["after"] == pytest.approx(MATRICES / 2, rel=0.03)


def held(run_dir: Path, rank: int) -> dict[str, int]:
    """See eight_bit_worker.py."""
    found: dict[str, int] = json.loads((run_dir / f"held-{rank}.json").read_text(encoding="utf-8"))
    return found
