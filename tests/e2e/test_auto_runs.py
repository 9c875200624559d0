"""`parallelism=auto` in a whole command: the run's files know plain sizes, and the same command may resume it."""

import pytest
from omegaconf import OmegaConf

from posttrain.config.composition import compose
from posttrain.errors import UserError
from posttrain.plan import auto
from posttrain.spec import resumption

pytestmark = pytest.mark.nightly


def test_sizes_are_recorded_and_the_same_command_may_go_on(posttrain, words):
    words = [*words, "parallelism=auto", "trainer.max_steps=1", "trainer.export=false", "data.validation_fraction=null"]
    run = posttrain(*words)
    assert run.code == 0, run.err + run.log()
    assert run.out.startswith("parallelism=auto: on a CPU, 1 process\n")
    frozen = OmegaConf.load(run.run_dir / "config.yaml").parallelism
    assert (frozen.auto, frozen.nproc_per_node, frozen.tensor_model_parallel_size) == (False, 1, 1)
    again = compose([*words, "trainer.max_steps=2"])
    with pytest.raises(UserError, match=r"parallelism\.context_parallel_size: 1 -> 2"):
        resumption.check(OmegaConf.merge(again, {"parallelism": {"context_parallel_size": 2}}), run.run_dir)
    auto.resolve(again, 0)
    resumption.check(again, run.run_dir)
