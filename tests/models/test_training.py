"""Every family trained by the product gives the loss curve of a plain transformers (and peft) loop."""

import pytest
from curves import error, losses
from families import FAMILIES


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, dict]:
    """family-method -> losses of the product (ours) and of the plain loop."""
    cases = [f"{family}-{method}" for family in FAMILIES for method in ("full", "lora")]
    return losses(tmp_path_factory.mktemp("training"), cases)


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_curve(family, method, results, record_property):
    result = results[f"{family}-{method}"]
    assert "error" not in result, result["error"]
    ours = result["ours"]
    assert len(ours) == 20
    assert ours[-1] < 0.9 * ours[0]  # it learns
    found = error(ours, result["plain"])
    record_property("error", found)  # scripts/family_table.py reads it
    assert found < 1e-4
