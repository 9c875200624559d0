"""The rooms of docs/architecture.md are those of the import contract, and no two modules import each other."""

import subprocess
import sys
import tomllib
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NO_TORCH = [
    "errors",
    "utils",
    "patches",
    "config",
    "report",
    "demo",
    "models",
    "data",
    "spec",
    "plan",
    "recipes",
    "sweep",
    "cli",
    "launch.launcher",
]


def test_the_picture_is_the_contract():
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]
    picture = (ROOT / "docs" / "architecture.md").read_text().partition("```text\n")[2].partition("```")[0]
    rooms = [line[:25].split() for line in picture.splitlines()]
    assert rooms == [layer.split(" | ") for layer in contract["layers"]]


def test_no_two_modules_import_each_other():
    grimp = pytest.importorskip("grimp")
    graph = grimp.build_graph("posttrain", exclude_type_checking_imports=True)
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    TopologicalSorter(imports).prepare()  # raises CycleError, with the circle


def test_rooms_without_torch():
    program = (
        "import importlib, sys\n"
        f"for room in {NO_TORCH}: importlib.import_module(f'posttrain.{{room}}')\n"
        "print([name for name in ('torch', 'megatron') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
