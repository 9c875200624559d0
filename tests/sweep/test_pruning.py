"""Which trials end early: Optuna's verdicts, from directories as runs leave them."""

import json
import random
import warnings
from types import SimpleNamespace

import pytest

from posttrain.config.composition import compose
from posttrain.errors import UserError
from posttrain.spec.checks import check
from posttrain.sweep import optuna as optuna_sweeps
from posttrain.train.pruning import above_median, among_best, verdict


@pytest.fixture(scope="module")
def optuna():
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    return optuna


def curves(seed, count=24, steps=(5, 10, 20, 40, 80)):
    """Losses that fall at different rates, some crossing; the last trials are shorter, as running ones are."""
    rng = random.Random(seed)
    made = []
    for number in range(count):
        start, rate = rng.uniform(2, 3), rng.uniform(-0.1, 0.5)
        done = steps if number < count // 2 else steps[: rng.randint(1, len(steps))]
        made.append({step: start * step**-rate + rng.uniform(-0.1, 0.1) for step in done})
    return made


@pytest.mark.parametrize("seed", range(5))
def test_median_as_optuna_does(seed, optuna):
    study = optuna.create_study(pruner=optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=10))
    finished, verdicts = [], []
    for curve in curves(seed):
        trial, own = study.ask(), {}
        for step, loss in curve.items():
            own[step] = loss
            trial.report(loss, step)
            verdicts.append(trial.should_prune())
            assert above_median(own, finished, 4, 10) == verdicts[-1]
        study.tell(trial, loss)
        finished.append(curve)
    assert {True, False} == set(verdicts)


@pytest.mark.parametrize("seed", range(5))
def test_halving_as_optuna_does(seed, optuna):
    study = optuna.create_study(pruner=optuna.pruners.SuccessiveHalvingPruner(min_resource=5, reduction_factor=4))
    begun, verdicts = [], []
    for curve in curves(seed):
        trial, own = study.ask(), {}
        for step, loss in curve.items():
            own[step] = loss
            trial.report(loss, step)
            verdicts.append(trial.should_prune())
            assert among_best(own, begun, 5) != verdicts[-1]
            if verdicts[-1]:
                break
        begun.append(own)
    assert {True, False} == set(verdicts)


def write(path, losses, state):
    path.mkdir()
    (path / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": step, "time": 0.0, "val_loss": loss}) + "\n" for step, loss in losses.items())
    )
    (path / "status.json").write_text(json.dumps({"state": state}))


def test_a_trial_reads_its_neighbours(tmp_path):
    sweep = SimpleNamespace(pruner="median", pruner_startup_trials=2, pruner_warmup_steps=0)
    for number, state in enumerate(("finished", "running", "pruned", "failed")):
        write(tmp_path / str(number), {0: 9.0, 5: 1.0, 10: 0.5}, state)
    write(tmp_path / "own", {0: 9.0, 5: 2.0}, "running")
    assert verdict(tmp_path / "own", sweep) is None  # one has finished
    write(tmp_path / "4", {0: 9.0, 5: 1.5}, "finished")
    assert verdict(tmp_path / "own", sweep) == "pruned after step 5: validation loss 2, against 2 finished trials"
    sweep.pruner_warmup_steps = 6
    assert verdict(tmp_path / "own", sweep) is None
    sweep = SimpleNamespace(pruner="halving", pruner_warmup_steps=0)
    assert "against 5 trials" in verdict(tmp_path / "own", sweep)
    write(tmp_path / "better", {0: 9.0, 5: 0.9}, "running")
    assert verdict(tmp_path / "better", sweep) is None


def test_a_trial_validated_on_other_rows_is_no_measure(tmp_path):
    sweep = SimpleNamespace(pruner="median", pruner_startup_trials=1, pruner_warmup_steps=0)
    write(tmp_path / "own", {0: 9.0, 5: 2.0}, "running")
    write(tmp_path / "other", {0: 9.0, 5: 1.0}, "finished")
    for name, digest in (("own", "new"), ("other", "old")):
        (tmp_path / name / "inputs.json").write_text(json.dumps({"validation": digest}))
    assert verdict(tmp_path / "own", sweep) is None
    (tmp_path / "other/inputs.json").write_text(json.dumps({"validation": "new"}))
    assert verdict(tmp_path / "own", sweep) is not None


def test_a_search_and_a_pruner_need_a_validation_set():
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    search = ["hydra/sweeper=optuna", "data.validation_path=null"]
    with pytest.raises(UserError, match=r"optuna: minimises the validation loss.*data\.validation_fraction"):
        optuna_sweeps.check(compose(search, with_hydra=True))
    optuna_sweeps.check(compose([*search, "data.validation_fraction=0.1"], with_hydra=True))
    optuna_sweeps.check(compose(["data.validation_path=null"], with_hydra=True))  # a grid
    with pytest.raises(UserError, match=r"`sweep\.pruner=median`: compares validation losses.*validation_fraction"):
        check(compose(["sweep.pruner=median", "trainer.validation_interval=1", "data.validation_path=null"]), 0)


def test_a_pruner_needs_validations():
    with pytest.raises(UserError, match=r"trainer\.validation_interval"):
        check(compose(["sweep.pruner=median", "trainer.validation_interval=null"]), 0)


def test_one_trial_is_no_trials(tmp_path):
    sweep = SimpleNamespace(pruner="halving", pruner_warmup_steps=0)
    write(tmp_path / "0", {0: 9.0, 5: 1.0}, "finished")
    write(tmp_path / "own", {0: 9.0, 5: 2.0}, "running")
    assert verdict(tmp_path / "own", sweep).endswith("against 1 trial that came as far")
