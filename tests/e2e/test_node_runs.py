"""Several machines, each emulated by a command of its own, and torchrun: the losses of one process."""

import subprocess
import sys

import pytest
from commands import ROOT, Result, environment

from posttrain.launch.nodes import reserve_port

pytestmark = pytest.mark.nightly

STEPS = "trainer.max_steps=3"


def wait(*processes, run_dir):
    """The results of commands that run at the same time."""
    ended = []
    for process in processes:
        out, err = process.communicate(timeout=300)
        ended.append(Result(process.returncode, out, err, run_dir))
    return ended


def start(command, posttrain, cwd):
    env = {**environment(posttrain.cache), "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, cwd=cwd, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.fixture(scope="module")
def alone(posttrain, words):
    """The losses of one process."""
    result = posttrain(*words, STEPS, "trainer.export=false")
    assert result.code == 0, result.err
    return result.losses


@pytest.fixture
def same(words):
    return [*words, STEPS, "trainer.export=false"]


def test_two_machines_by_hand(posttrain, same, alone, tmp_path):
    run_dir = tmp_path / "run"
    with reserve_port() as held:
        port = held.getsockname()[1]
        command = [sys.executable, "-m", "posttrain", *same, "launch.nnodes=2", f"launch.master_port={port}",
                   f"hydra.run.dir={run_dir}"]  # fmt: skip
        commands = [start([*command, f"launch.node_rank={rank}"], posttrain, tmp_path) for rank in (1, 0)]
        second, first = wait(*commands, run_dir=run_dir)
    assert (first.code, second.code) == (0, 0), first.err + second.err + first.log(0) + first.log(1)
    assert first.losses == pytest.approx(alone, abs=2e-5)


def test_the_ranks_that_torchrun_gives(posttrain, same, alone, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d",
                "--rdzv-endpoint=127.0.0.1:0", "--rdzv-id=seven"]  # fmt: skip
    (result,) = wait(
        start([*torchrun, "-m", "posttrain", *same], posttrain, tmp_path), run_dir=tmp_path / "outputs/torchrun-seven"
    )
    assert result.code == 0, result.err
    assert result.losses == pytest.approx(alone, abs=2e-5)
