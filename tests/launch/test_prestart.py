"""Which command lines start a rank before they are composed."""

import pytest

from posttrain.launch.prestart import is_wanted


@pytest.mark.parametrize(
    ("words", "gpus", "expected"),
    [
        ([], 1, True),
        ([], 0, False),
        (["model=llama3_8b", "peft=lora"], 8, True),
        (["launch.prestart=true"], 0, True),
        (["launch.prestart=true", "launch.prestart=null"], 0, False),
        (["launch.prestart=false"], 1, False),
        (["--multirun", "optimizer.lr=1e-4,2e-4"], 1, False),
        (["--cfg", "job"], 1, False),
        (["launch.submit=true"], 1, False),
        (["hydra/launcher=slurm"], 1, False),
    ],
)
def test_one_run_here(words, gpus, expected):
    assert is_wanted(words, gpus) is expected
