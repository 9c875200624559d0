"""No module outside patches/ changes upstream without an entry in patches/elsewhere.py, and no entry is stale."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from posttrain.patches.elsewhere import CHANGES

ROOT = Path(__file__).resolve().parents[2]
# Registering what is ours is what these are for; replacing what is there is a change.
OWN_RESOLVERS = ("if_null", "times", "sweep_name")
# Functions are values of these: a field of a provider, and of our own adapters.
FIELDS = ("transformer_layer_spec", "start")


class Finder(ast.NodeVisitor):
    """Collects what a module changes of others.

    Attributes:
        found: targets, as `ChangeElsewhere.targets` names them.
    """

    def __init__(self, tree: ast.Module) -> None:
        self.found: set[str] = set()
        self.imported: dict[str, str] = {}
        self.functions: set[str] = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                self._note_import(node)
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                for alias in node.names:
                    self.imported[alias.asname or alias.name] = f"{node.module}.{alias.name}"
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                self.functions.add(node.name)
        self.visit(tree)

    def _note_import(self, node: ast.Import) -> None:
        for alias in node.names:
            if alias.asname:
                self.imported[alias.asname] = alias.name
            else:
                top = alias.name.partition(".")[0]
                self.imported[top] = top

    def visit_Assign(self, node: ast.Assign) -> None:
        """`x.y = value`, also in chains and tuples."""
        for target in node.targets:
            self._changed(target, node.value)
        self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        """`x.y += value`."""
        self._changed(node.target, node.value)
        self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        """`x.y: T = value`."""
        self._changed(node.target, node.value)
        self.generic_visit(node)

    def visit_Delete(self, node: ast.Delete) -> None:
        """`del x.y`."""
        for target in node.targets:
            self._changed(target, None)

    def visit_Call(self, node: ast.Call) -> None:
        """`setattr(x, "y", value)`, methods that change a dict in place, registries of upstream's."""
        name = ast.unparse(node.func)
        if name in ("setattr", "delattr") and self._upstream(node.args[0]):
            self.found.add(self._dotted(node.args[0]))
        if isinstance(node.func, ast.Attribute):
            method, owner = node.func.attr, node.func.value
            if method in ("update", "setdefault", "pop", "clear") and isinstance(owner, ast.Attribute):
                self._changed(owner, None)
            if method == "register_bridge":
                self.found.add(self._dotted(node.func))
            if method == "register_new_resolver" and ast.literal_eval(node.args[0]) not in OWN_RESOLVERS:
                self.found.add(f"{self._dotted(node.func)}({ast.literal_eval(node.args[0])})")
        if name.split(".")[-1] in ("on_import", "defer", "lazy") and self._dotted(node.func).startswith(
            "posttrain.patches"
        ):
            self.found.add(self._dotted(node.func))
        self.generic_visit(node)

    def _changed(self, target: ast.expr, value: ast.expr | None) -> None:
        """Note `target` if it is another's: upstream's by name, or a method or private attribute of an object."""
        if isinstance(target, ast.Tuple | ast.List):
            for part in target.elts:
                self._changed(part, None)
            return
        if isinstance(target, ast.Subscript) and ast.unparse(target.value) == "sys.modules":
            self.found.add("sys.modules")
            return
        if isinstance(target, ast.Subscript) and self._upstream(target.value):
            self.found.add(self._dotted(target.value))
        if not isinstance(target, ast.Attribute):
            return
        if self._upstream(target):
            self.found.add(self._dotted(target))
        elif ast.unparse(target.value) not in ("self", "cls") and self._hidden_or_method(target.attr, value):
            self.found.add(target.attr)

    def _hidden_or_method(self, name: str, value: ast.expr | None) -> bool:
        if name.startswith("__"):
            return name == "__class__"
        function = isinstance(value, ast.Lambda) or (isinstance(value, ast.Name) and value.id in self.functions)
        return name.startswith("_") or (function and name not in FIELDS)

    def _root(self, node: ast.expr) -> ast.expr:
        while isinstance(node, ast.Attribute | ast.Subscript | ast.Call):
            node = node.func if isinstance(node, ast.Call) else node.value
        return node

    def _upstream(self, node: ast.expr) -> bool:
        """Whether a name leads to a package that is neither this one nor Python's."""
        root = self._root(node)
        if not isinstance(root, ast.Name) or root.id not in self.imported:
            return False
        package = self.imported[root.id].partition(".")[0]
        return package not in ("posttrain", "hydra_plugins") and package not in sys.stdlib_module_names

    def _dotted(self, node: ast.expr) -> str:
        text, root = ast.unparse(node), self._root(node)
        if isinstance(root, ast.Name) and root.id in self.imported:
            return self.imported[root.id] + text.removeprefix(root.id)
        return text


def modules() -> Iterator[tuple[str, Path]]:
    """Every module outside patches/, and its file."""
    for top in ("posttrain", "hydra_plugins"):
        for path in sorted((ROOT / top).rglob("*.py")):
            parts = list(path.relative_to(ROOT).with_suffix("").parts)
            if parts[:2] == ["posttrain", "patches"]:
                continue
            if parts[-1] == "__init__":
                parts.pop()
            yield ".".join(parts), path


def found_in(source: str) -> set[str]:
    """What a module's text changes."""
    return Finder(ast.parse(source)).found


def covers(entry: str, module: str) -> bool:
    """Whether an entry's module is, or is a package above, `module`."""
    return module == entry or module.startswith(entry + ".")


def test_every_change_is_registered():
    unregistered = []
    for module, path in modules():
        registered = {target for change in CHANGES if covers(change.module, module) for target in change.targets}
        unregistered += [f"{module}: {target}" for target in sorted(found_in(path.read_text()) - registered)]
    assert not unregistered


def test_every_entry_is_still_there():
    found = [(module, found_in(path.read_text())) for module, path in modules()]
    for change in CHANGES:
        for target in change.targets:
            assert any(covers(change.module, module) and target in targets for module, targets in found), change


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("import torch\ntorch.cuda.is_available = f", "torch.cuda.is_available"),
        ("import torch as t\nt.cuda.x += 1", "torch.cuda.x"),
        ("from megatron.core import optimizer\noptimizer.Adam, y = 1, 2", "megatron.core.optimizer.Adam"),
        ("def f():\n    from hydra.core import a\n    a.B.instance().c['x'] = 1", "hydra.core.a.B.instance().c"),
        ("from megatron.core import a\nsetattr(a.B, 'forward', f)", "megatron.core.a.B"),
        ("from megatron.core import a\ndel a.B", "megatron.core.a.B"),
        ("import transformers\ntransformers.TABLE.update(x=1)", "transformers.TABLE"),
        ("import sys\nsys.modules['torch'] = None", "sys.modules"),
        ("def f(): ...\ndef g(x):\n    x.step = f", "step"),
        ("def g(x):\n    x.step = lambda: 0", "step"),
        ("def g(x):\n    x.part._hidden = 1", "_hidden"),
        ("def g(x):\n    x.__class__ = Other", "__class__"),
        ("from posttrain.patches.deferred import on_import\non_import('a', f)", "posttrain.patches.deferred.on_import"),
        (
            "from omegaconf import OmegaConf as O\nO.register_new_resolver('oc.env', f)",
            "omegaconf.OmegaConf.register_new_resolver(oc.env)",
        ),
    ],
)
def test_the_search_finds(source, target):
    assert found_in(source) == {target}


@pytest.mark.parametrize(
    "source",
    [
        "import os\nos.environ['A'] = '1'",
        "class A:\n    def f(self):\n        self._x = 1",
        "import torch\nx = torch.ones(1)",
        "from posttrain import launch\nlaunch.x = 1",
        "def g(provider):\n    provider.bf16 = True",
    ],
)
def test_the_search_leaves(source):
    assert not found_in(source)
