"""Deferred imports, on small packages of their own."""

import pickle
import sys
import typing

import pytest

from posttrain.patches.deferred import Deferred, Rule, defer, installed, is_deferred, lazy, on_import, reexports


@pytest.fixture
def package(tmp_path, monkeypatch, request):
    """A function that writes a fresh package, from module -> source (PKG stands for its name), and returns its name."""
    name = "pkg_" + "".join(character for character in request.node.name if character.isalnum())
    monkeypatch.syspath_prepend(tmp_path)

    def write(files):
        for module, source in ({"__init__": "", "sub/__init__": ""} | files).items():
            file = tmp_path / name / f"{module}.py"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(source.replace("PKG", name))
        return name

    yield write
    for module in [module for module in sys.modules if module.split(".")[0] == name]:
        del sys.modules[module]


def load(name):
    """Import a module and return it."""
    __import__(name)
    return sys.modules[name]


def test_module_level_import_waits_for_its_use(package):
    name = package(
        {
            "heavy": "class Thing:\n    pass\n",
            "user": "from PKG.heavy import Thing\ndef make():\n    return Thing()\n"
            "def ask(x):\n    return isinstance(x, (int, Thing))",
        }
    )
    defer(Rule((f"{name}.user",), (f"{name}.heavy",)))
    user = load(f"{name}.user")
    assert is_deferred(user.Thing) and f"{name}.heavy" not in sys.modules
    assert user.ask(1) and not user.ask("x") and f"{name}.heavy" not in sys.modules
    thing = user.make()
    assert user.ask(thing) and type(thing) is sys.modules[f"{name}.heavy"].Thing


def test_function_level_import_is_pythons_unless_asked(package):
    source = "def get():\n    from PKG.heavy import Thing\n    return Thing"
    name = package({"heavy": "class Thing:\n    pass\n", "one": source, "two": source})
    defer(Rule((f"{name}.one",), (f"{name}.heavy",)), Rule((f"{name}.two",), (f"{name}.heavy",), in_functions=True))
    assert is_deferred(load(f"{name}.two").get())
    assert not is_deferred(load(f"{name}.one").get())


def test_import_as_and_relative_imports(package):
    name = package(
        {
            "sub/heavy": "VALUE = 3\n",
            "user": "import PKG.sub.heavy as a\nfrom .sub.heavy import VALUE as b\nfrom .sub import heavy as c",
        }
    )
    defer(Rule((f"{name}.user",), (f"{name}.sub.heavy", f"{name}.sub:heavy")))
    user = load(f"{name}.user")
    assert all(map(is_deferred, (user.a, user.b, user.c))) and f"{name}.sub.heavy" not in sys.modules
    assert user.a.VALUE == 3 and user.c.VALUE == 3


def test_pattern_takes_some_names_of_a_module(package):
    name = package({"heavy": "class Big:\n    pass\nsmall = 1\n", "user": "from PKG.heavy import Big, small"})
    defer(Rule((f"{name}.user",), (f"{name}.heavy:[A-Z]*",)))
    user = load(f"{name}.user")
    assert is_deferred(user.Big) and user.small == 1


def test_subclass_decorator_and_annotation(package):
    name = package(
        {
            "heavy": "class Base:\n    word = 'base'\ndef twice(f):\n    return lambda: 2 * f()\n",
            "child": "from PKG.heavy import Base\nclass Child(Base):\n    pass",
            "deco": "from PKG.heavy import twice\n@twice\ndef one():\n    return 1",
            "hint": "from PKG.heavy import Base\ndef f(x: Base | None = None, y: 'int | Base' = 0) -> Base: ...",
        }
    )
    defer(Rule((name,), (f"{name}.heavy",)))
    hint = load(f"{name}.hint")
    assert typing.get_type_hints(hint.f)["x"] == typing.Optional[hint.Base]  # noqa: UP045
    assert f"{name}.heavy" not in sys.modules
    assert load(f"{name}.child").Child.word == "base" and load(f"{name}.deco").one() == 2


def test_missing_package(package):
    name = package(
        {
            "tries": "try:\n    import nowhere_to_be_found\n    HAVE = True\nexcept ImportError:\n    HAVE = False",
            "hard": "import nowhere_to_be_found.deep as nowhere\nfrom nowhere_to_be_found import Thing",
            "bare": "import nowhere_to_be_found",
        }
    )
    defer(
        Rule((f"{name}.tries",), ("nowhere_to_be_found",)),
        Rule((f"{name}.hard",), ("nowhere_to_be_found",), missing_too=True),
        Rule((f"{name}.bare",), ("nowhere_to_be_found",)),
    )
    assert load(f"{name}.tries").HAVE is False
    with pytest.raises(ModuleNotFoundError):
        load(f"{name}.bare")
    hard = load(f"{name}.hard")
    assert not isinstance(3, hard.Thing) and not issubclass(int, hard.Thing)
    with pytest.raises(ModuleNotFoundError, match=rf"nowhere_to_be_found.Thing is needed by {name}.hard"):
        hard.Thing()
    with pytest.raises(ModuleNotFoundError, match="nowhere_to_be_found is not installed"):
        hard.nowhere.anything  # noqa: B018


def test_only_missing_leaves_an_installed_package_alone(package):
    name = package({"heavy": "class Thing:\n    pass\n", "user": "from PKG.heavy import Thing"})
    defer(Rule((f"{name}.user",), (f"{name}.heavy",), missing_too=True, only_missing=True))
    assert not is_deferred(load(f"{name}.user").Thing)


def test_idle_call_loads_nothing(package):
    name = package({"heavy": "def save(model, state):\n    return 'saved'\n", "user": "from PKG.heavy import save"})
    defer(Rule((f"{name}.user",), (f"{name}.heavy",), idle={f"{name}.heavy:save": lambda model, state: not state}))
    user = load(f"{name}.user")
    assert user.save(None, {}) is None and f"{name}.heavy" not in sys.modules
    assert user.save(None, {"key": 1}) == "saved"
    assert user.save(None, {}) == "saved"  # loaded: no longer ours to answer


def test_pickle_and_equality():
    one, other = Deferred("json", "loads", "me"), Deferred("json", "loads")
    assert pickle.loads(pickle.dumps(one)) == one == other and len({one, other}) == 1
    assert one.__name__ == "loads" and one("3") == 3
    with pytest.raises(AttributeError):
        one.__wrapped__  # noqa: B018


def test_lazy_package_loads_a_name_when_asked(package):
    name = package(
        {
            "__init__": "'''Docs.'''\nfrom PKG.one import A\nfrom .two import B as C\n__all__ = ['A', 'C']\n",
            "one": "A = 1\n",
            "two": "B = 2\n",
        }
    )
    lazy(name)
    module = load(name)
    assert f"{name}.one" not in sys.modules and f"{name}.two" not in sys.modules
    assert module.C == 2 and f"{name}.one" not in sys.modules
    namespace = {}
    exec(f"from {name} import *", namespace)
    assert (namespace["A"], namespace["C"]) == (1, 2)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        module.nothing  # noqa: B018


@pytest.mark.parametrize(
    "source",
    ["from .one import A\nA = A + 1", "from .one import one", "from . import one", "from .one import *", "import os"],
)
def test_only_pure_reexports_are_lazy(source):
    assert not reexports("pkg", source, ["one"])


def test_hook_runs_between_import_and_use(package):
    name = package({"base": "value = 1\n", "user": "from PKG.base import value\n"})
    on_import(f"{name}.base", lambda module: setattr(module, "value", 2))
    assert load(f"{name}.user").value == 2
    on_import(f"{name}.base", lambda module: setattr(module, "value", 3))
    assert sys.modules[f"{name}.base"].value == 3


def test_installed(monkeypatch):
    assert installed("json") and not installed("nowhere_to_be_found")
    monkeypatch.setitem(sys.modules, "hidden_package", None)
    assert not installed("hidden_package")
