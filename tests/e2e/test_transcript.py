"""The transcript of docs/session.md is what the commands print today."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
import transcript

pytestmark = pytest.mark.nightly


@pytest.mark.timeout(900)
def test_the_page_shows_what_the_commands_print(shared, demo_cache, monkeypatch):
    """About two minutes on two quiet cores."""
    pytest.importorskip("gguf", reason="needs the extra `demo`")
    monkeypatch.setenv("POSTTRAIN_SHARED", str(shared))
    monkeypatch.setenv("POSTTRAIN_CACHE", str(demo_cache))
    assert transcript.differences(transcript.in_page(), transcript.run()) == []


@pytest.mark.every_run
@pytest.mark.parametrize(
    "old, new, equal",
    [
        ("loss 2.2213  eta 3 s", "loss 2.2301  eta 11 s", True),
        ("loss 2.2213", "loss 2.3213", False),
        ("first step after 28 s", "first step after 1 min 6 s", True),
        ("1,368 supervised tok/s of 12,992", "9 supervised tok/s of 50", True),
        ("peak memory 1.9 GiB", "peak memory 2.4 GiB", True),
        ("export: outputs/a/adapter", "export: outputs/b/adapter", False),
        ("a\nb", "a", False),
        ("step 1/3", "step 2/3", False),
    ],
)
def test_what_counts_as_different(old, new, equal):
    assert (transcript.differences(old, new) == []) is equal
