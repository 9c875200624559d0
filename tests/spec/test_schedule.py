"""Learning rates: Megatron's own in every step of every combination, Transformers' where it has the same schedule."""

import itertools
import math
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from posttrain.errors import UserError
from posttrain.spec.schedule import schedule_of

STYLES = ["constant", "linear", "cosine", "inverse-square-root", "WSD"]
ENDS = ["linear", "cosine", "exponential", "minus_sqrt"]
BATCH = 8


def config(style="cosine", lr=1e-3, min_lr=0.0, **scheduler):
    return OmegaConf.create(
        {"optimizer": {"lr": lr, "min_lr": min_lr}, "scheduler": {"lr_decay_style": style, **scheduler}}
    )


def rates(schedule):
    return [schedule.rate(step) for step in range(1, schedule.steps + 1)]


WARMUPS = [{}, *({"lr_warmup_iters": steps} for steps in (1, 7, 100))]
WARMUPS += [{"lr_warmup_fraction": share} for share in (0.05, 0.3)]
HORIZONS = [{}, {"lr_decay_iters": 15}, {"lr_decay_iters": 60}]
COMBINATIONS = [
    (style, steps, {**warmup, **horizon})
    for style, steps, warmup, horizon in itertools.product(STYLES[:4], (1, 10, 40), WARMUPS, HORIZONS)
    if style != "inverse-square-root" or "lr_warmup_iters" in warmup
] + [
    ("WSD", steps, {**warmup, "lr_wsd_decay_style": end, "lr_wsd_decay_iters": final})
    for steps, warmup, end, final in itertools.product((10, 40), WARMUPS, ENDS, (3, 100))
]


def test_megatron_has_the_same_in_every_step():
    """Its scheduler as Megatron-Bridge builds it from what `train.megatron_config.schedule` sets."""
    from posttrain import patches

    patches.apply(patches.Platform("cpu", False))
    from megatron.bridge.training.config import OptimizerConfig, SchedulerConfig

    from posttrain.train import megatron_config
    from posttrain.train.learning_rates import ProportionalScheduler, follow

    assert len(COMBINATIONS) > 200
    for style, steps, fields in COMBINATIONS:
        schedule = schedule_of(config(style, min_lr=1e-4, **fields), steps)
        groups = SimpleNamespace(
            optimizer=OptimizerConfig(lr=1e-3, min_lr=1e-4, weight_decay=0.1),
            scheduler=SchedulerConfig(lr_decay_style=style, **fields),
        )
        asked = megatron_config.schedule(SimpleNamespace(groups=groups, steps=steps, schedule=schedule))
        asked.finalize()
        warmup = asked.lr_warmup_iters * BATCH
        if asked.lr_warmup_fraction is not None:
            warmup = asked.lr_warmup_fraction * asked.lr_decay_iters * BATCH
        assert warmup < asked.lr_decay_iters * BATCH
        final = asked.lr_wsd_decay_iters
        plain = {"lr": 0.0}
        faster = {"lr": 0.0, "max_lr": 16e-3, "min_lr": 16e-4}  # LoRA+
        scheduler = ProportionalScheduler.__base__(
            SimpleNamespace(param_groups=[plain, faster]), asked.lr_warmup_init, 1e-3, 1e-4, warmup,
            asked.lr_decay_iters * BATCH, style, 0.1, 0.1, steps * BATCH, "constant",
            use_checkpoint_opt_param_scheduler=False, override_opt_param_scheduler=True,
            wsd_decay_steps=final * BATCH if final else None, lr_wsd_decay_style=asked.lr_wsd_decay_style,
        )  # fmt: skip
        follow(scheduler, schedule, BATCH)  # compares each step
        for step in range(1, steps + 1):
            assert plain["lr"] == pytest.approx(schedule.rate(step), rel=1e-9), (style, steps, fields, step)
            assert faster["lr"] == pytest.approx(16 * plain["lr"], rel=1e-9), (style, steps, fields, step)
            scheduler.step(BATCH)


def test_a_scheduler_that_differs_is_noticed():
    from posttrain import patches

    patches.apply(patches.Platform("cpu", False))
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    from posttrain.train.learning_rates import follow

    scheduler = OptimizerParamScheduler(
        SimpleNamespace(param_groups=[{"lr": 0.0}]), 1e-3, 1e-3, 0.0, 0, 11 * BATCH, "cosine", 0.0, 0.0, 1, "constant",
        use_checkpoint_opt_param_scheduler=False,
    )  # fmt: skip
    with pytest.raises(UserError, match="not under trainer"):
        follow(scheduler, schedule_of(config("cosine"), 10), BATCH)


@pytest.mark.parametrize(
    ("style", "name"), [("linear", "linear"), ("cosine", "cosine"), ("constant", "constant_with_warmup")]
)
def test_after_the_warm_up_transformers_has_the_same(style, name):
    import torch
    from transformers import get_scheduler

    steps, warmup = 30, 5
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-3)
    theirs = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=steps)
    found = []
    for _ in range(steps):
        found.append(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()
    ours = rates(schedule_of(config(style, lr_warmup_iters=warmup), steps))
    assert ours[warmup:] == pytest.approx(found[warmup:], rel=1e-9)
    # Theirs begins at 0, a step that changes nothing; ours rises in the same number of equal parts.
    assert ours[:warmup] == pytest.approx([1e-3 * step / (warmup + 1) for step in range(1, warmup + 1)])


def test_a_decay_longer_than_the_run_is_shortened():
    schedule = schedule_of(config("WSD", lr_wsd_decay_iters=100, lr_warmup_fraction=0.05), 20)
    assert "shortened to 19" in schedule.notes[0]
    found = rates(schedule)
    assert found[1] == 1e-3 and found[-1] == pytest.approx(1e-3 / 19, rel=1e-6)
    assert all(math.isclose(a - b, 1e-3 / 19, rel_tol=1e-6) for a, b in itertools.pairwise(found[1:]))


def test_a_warm_up_longer_than_the_run_keeps_its_slope():
    schedule = schedule_of(config("cosine", lr_warmup_iters=100), 10)
    assert rates(schedule) == pytest.approx([1e-3 * step / 101 for step in range(1, 11)])
    assert "longer than the run" in schedule.notes[0] and schedule.describe().endswith("9.9e-05 at step 10 (cosine)")


def test_a_share_is_of_all_steps():
    schedule = schedule_of(config("cosine", lr_warmup_fraction=0.2, lr_decay_iters=40), 10)
    assert schedule.warmup == 2 and rates(schedule)[2] == pytest.approx(1e-3)


def test_a_root_of_no_warm_up_is_refused():
    with pytest.raises(UserError, match="lr_warmup_iters"):
        schedule_of(config("inverse-square-root", lr_warmup_fraction=0.05), 10)


def test_in_a_line():
    assert schedule_of(config("linear", lr_warmup_iters=4), 20).describe() == (
        "0.0002 at step 1, 0.001 at step 5, 6.25e-05 at step 20 (linear)"
    )
    assert schedule_of(config("constant"), 5).describe() == "0.001 at step 1, 0.001 at step 5 (constant)"
