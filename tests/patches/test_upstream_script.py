"""`make upstream`: what it asks uv to resolve."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def upstream():
    sys.path.insert(0, str(ROOT / "scripts"))
    import upstream

    sys.path.remove(str(ROOT / "scripts"))
    return upstream


def test_exact_versions_become_lower_bounds_in_dependencies_alone(upstream):
    project = (ROOT / "pyproject.toml").read_text()
    relaxed = upstream.relaxed(project)
    assert '"megatron-bridge==' in project and '"megatron-bridge>=' in relaxed
    dependencies, _, rest = relaxed.partition("[project.optional-dependencies]")
    assert "==" not in dependencies
    assert rest == project.partition("[project.optional-dependencies]")[2]


def test_the_lock_has_what_is_upgraded(upstream):
    assert set(upstream.NEWEST) <= upstream.locked(ROOT / "uv.lock").keys()


def test_the_tests_are_there(upstream):
    assert all((ROOT / name).exists() for name in upstream.TESTS)
