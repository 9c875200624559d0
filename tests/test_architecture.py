"""The rooms of docs/architecture.md are those of the import contract, and no two modules import each other."""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
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

# What a command does without until it needs it: loading each takes from some hundredths of a second to several
# seconds (transformers' models, Megatron), or it is an extra. An import inside a function leads to one of these.
COSTLY = {
    "cel",
    "datasets",
    "gguf",
    "huggingface_hub",
    "jinja2",
    "lm_eval",
    "megatron",
    "mlflow",
    "multiprocessing",
    "numpy",
    "openpyxl",
    "peft",
    "psutil",
    "pyarrow",
    "rich",
    "safetensors",
    "sklearn",
    "submitit",
    "tokenizers",
    "torch",
    "trackio",
    "transformers",
    "triton",
    "wandb",
}


def test_the_picture_is_the_contract():
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]
    picture = (ROOT / "docs" / "architecture.md").read_text().partition("```text\n")[2].partition("```")[0]
    rooms = [line[:45].split() for line in picture.splitlines()]
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


def test_an_import_inside_a_function_is_a_costly_one():
    upwards = "posttrain/patches/startup/imports.py"  # one that the contract excepts; at the top it would be a circle
    needless = []
    for path in sorted((ROOT / "posttrain").rglob("*.py")):
        tree = ast.parse(path.read_text())
        top = set(map(id, at_start(tree)))
        for node in ast.walk(tree):
            if not isinstance(node, ast.Import | ast.ImportFrom) or id(node) in top or in_type_checking(tree, node):
                continue
            if not any(leads_to_costly(name) for name in imported(node)):
                needless.append(f"{path.relative_to(ROOT)}: {ast.unparse(node)}")
    assert needless == [f"{upwards}: from posttrain.models.bridges import register"]


def at_start(tree: ast.Module) -> Iterator[ast.Import | ast.ImportFrom]:
    """The imports that run when the module is imported."""
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node


def in_type_checking(tree: ast.Module, node: ast.AST) -> bool:
    """Whether it is there for type checkers alone."""
    return any(isinstance(block, ast.If) and node in ast.walk(block) for block in tree.body)


def imported(node: ast.Import | ast.ImportFrom) -> list[str]:
    """The names of modules, or of things in one, that an import statement has."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [f"{node.module}.{alias.name}" for alias in node.names]


@cache
def leads_to_costly(name: str) -> bool:
    """Whether importing it loads one of COSTLY."""
    if name.partition(".")[0] != "posttrain":
        return name.partition(".")[0] in COSTLY
    path = ROOT / name.replace(".", "/")
    if not path.is_dir() and not path.with_suffix(".py").is_file():  # a thing in a module
        return name != "posttrain" and leads_to_costly(name.rpartition(".")[0])
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return any(leads_to_costly(each) for node in at_start(ast.parse(file.read_text())) for each in imported(node))
