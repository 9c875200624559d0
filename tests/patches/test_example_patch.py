"""The example of a patch in docs/: registered, wanted where it says, and it does what it says."""

import logging
import sys
from pathlib import Path

from posttrain import patches
from posttrain.patches import Platform, registry

EXAMPLES = Path(__file__).resolve().parents[2] / "docs" / "examples"


def test_the_long_line_is_cut(monkeypatch, caplog):
    patches.apply(Platform("cpu", False))
    import megatron.core.optimizer as module

    monkeypatch.setattr(registry, "REGISTRY", dict(registry.REGISTRY))
    monkeypatch.setattr(module, "log_single_rank", module.log_single_rank)
    monkeypatch.syspath_prepend(EXAMPLES)
    sys.modules.pop("quiet_optimizer", None)
    import quiet_optimizer  # noqa: F401

    patch = registry.REGISTRY["quiet-optimizer"]
    assert patch.wanted(Platform("cpu", False)) and not patch.wanted(Platform("cuda", True))
    line = f"Setting up optimizer with config {module.OptimizerConfig()}"
    assert len(line) > 1500
    said = []
    for apply in (lambda: None, patch.apply):
        apply()
        with caplog.at_level(logging.INFO):
            module.log_single_rank(logging.getLogger("optimizer"), logging.INFO, line)
        said.append(caplog.messages[-1])
    assert said == [line, line[:80] + "..."]
