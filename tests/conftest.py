"""Fixtures for every test."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of optional shared test data (POSTTRAIN_SHARED, else ../shared); without it the test is skipped."""
    folder = Path(os.environ.get("POSTTRAIN_SHARED", ROOT.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"optional shared test data: no folder {folder} (set POSTTRAIN_SHARED)")
    return folder
