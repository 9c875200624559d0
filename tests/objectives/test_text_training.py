"""Continued pre-training gives the loss curve of a plain transformers loop over the same windows."""

import pytest
from curves import error, losses


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, dict]:
    return losses(tmp_path_factory.mktemp("text"), ["llama-text", "llama-stream"])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["text", "stream"])
def test_loss_curve(method, results, record_property):
    result = results[f"llama-{method}"]
    assert "error" not in result, result["error"]
    assert len(result["ours"]) == 20
    assert result["ours"][-1] < 0.9 * result["ours"][0]  # it learns
    found = error(result["ours"], result["plain"])
    record_property("error", found)
    assert found < 1e-4
