"""Which command lines start ranks before they are composed, and how many."""

import pytest

from posttrain.launch.prestart import ranks_wanted


@pytest.mark.parametrize(
    ("words", "gpus", "expected"),
    [
        ([], 1, 1),
        ([], 0, 0),
        (["model=llama3_8b", "peft=lora"], 8, 8),
        (["launch.prestart=true"], 0, 1),
        (["launch.prestart=true", "launch.prestart=null"], 0, 0),
        (["launch.prestart=false"], 1, 0),
        (["launch.prestart=true", "parallelism.nproc_per_node=2"], 0, 2),
        (["launch.prestart=true", "parallelism.nproc_per_node=100000"], 0, 4),
        (["parallelism=single"], 8, 1),
        (["parallelism=tp2", "parallelism.nproc_per_node=2"], 8, 2),
        (["parallelism.nproc_per_node=9"], 8, 8),
        (["parallelism.nproc_per_node=null"], 8, 8),
        (["--multirun", "optimizer.lr=1e-4,2e-4"], 1, 0),
        (["--cfg", "job"], 1, 0),
        (["launch.submit=true"], 1, 0),
        (["hydra/launcher=slurm"], 1, 0),
    ],
)
def test_one_run_here(words, gpus, expected, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: range(4))
    assert ranks_wanted(words, gpus) == expected
