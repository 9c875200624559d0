"""Imports that wait until what they name is used.

`defer(rules)` puts a finder in front of Python's own for the packages that the rules name as importers. A module found
there runs with an `__import__` of its own: an import that a rule covers binds a `Deferred` object and loads nothing.
Everybody else's imports are Python's: `import wandb` in a logger loads wandb.
`lazy(packages)` makes packages whose `__init__` only re-exports load each name when it is asked for, and `on_import`
changes a module in the moment between its import and its first use.
"""

import ast
import builtins
import importlib
import importlib.util
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from typing import Any, TypeGuard

_RULES: list["Rule"] = []
_LAZY: list[str] = []
_HOOKS: dict[str, list[Callable[[types.ModuleType], None]]] = {}
_executing = 0  # how many of our modules are in the middle of their import


class Deferred:
    """A name of a module that has not been imported.

    It may stand in an annotation, a default, or the second place of `isinstance`, which is False as long as nobody has
    loaded the module, since no instance can exist. Calling it, subclassing it or, once imports are over, reading an
    attribute loads the module.

    Args:
        module: dotted name of the module.
        name: dotted name inside it; empty for the module itself.
        importer: who asked for it; for the error's message.
        idle: tells from a call's arguments that it would do nothing and return None, as long as nobody has loaded the
            module; such a call loads nothing.
    """

    __slots__ = ("_idle", "_importer", "_module", "_name")

    def __init__(self, module: str, name: str = "", importer: str = "", idle: Callable[..., bool] | None = None):
        self._module = module
        self._name = name
        self._importer = importer
        self._idle = idle

    def _path(self) -> str:
        return f"{self._module}.{self._name}" if self._name else self._module

    def _loaded(self) -> Any:
        """The real thing if somebody has loaded it; never loads anything."""
        if self._path() in sys.modules:
            return sys.modules[self._path()]
        value: object = sys.modules.get(self._module)
        for part in self._name.split("."):
            names = getattr(value, "__dict__", {})  # getattr(value, part) would load from a package that is lazy itself
            submodule = names.get("_class_to_module", {}).get(part)  # transformers: the class may be there all the same
            if submodule and f"{self._module}.{submodule}" in sys.modules:
                value = getattr(value, part)
            else:
                value = names.get(part)
        return value

    def _resolve(self) -> Any:
        """The real thing, loaded now.

        Raises:
            ModuleNotFoundError: the package is not installed.
        """
        try:
            value: object = importlib.import_module(self._module)
            path = self._module
            for part in filter(None, self._name.split(".")):
                path += f".{part}"
                if not hasattr(value, part):
                    importlib.import_module(path)
                value = getattr(value, part)
        except ModuleNotFoundError as error:
            package = self._module.partition(".")[0]
            raise ModuleNotFoundError(
                f"{self._path()} is needed by {self._importer}, but {error.name} is not installed: "
                f"install the package that provides {package}, or turn off the option that uses it",
                name=error.name,
            ) from error
        return value

    def __getattr__(self, name: str) -> object:
        if name in ("__name__", "__qualname__"):
            return self._path().rpartition(".")[2]
        if name.startswith("__"):
            raise AttributeError(f"{self._path()} is not loaded: no {name}")
        if _executing:  # also each step of `import a.b.c as d`
            inner = f"{self._name}.{name}" if self._name else name
            return Deferred(self._module, inner, self._importer)
        return getattr(self._resolve(), name)

    def __call__(self, *args: object, **kwargs: object) -> object:
        if self._idle and self._loaded() is None and self._idle(*args, **kwargs):
            return None
        return self._resolve()(*args, **kwargs)

    def __instancecheck__(self, instance: object) -> bool:
        real = self._loaded()
        return real is not None and isinstance(instance, real)

    def __subclasscheck__(self, cls: type) -> bool:
        real = self._loaded()
        return real is not None and issubclass(cls, real)

    def __mro_entries__(self, bases: tuple[type, ...]) -> tuple[type, ...]:
        return (self._resolve(),)

    def __contains__(self, item: object) -> bool:
        return item in self._resolve()

    def __getitem__(self, item: object) -> object:
        return self._resolve()[item]

    def __or__(self, other: object) -> object:
        return typing.Union[self, other]  # noqa: UP007  (X | Y would call this method again)

    def __ror__(self, other: object) -> object:
        return typing.Union[other, self]  # noqa: UP007

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Deferred) and self._path() == other._path()

    def __hash__(self) -> int:
        return hash(self._path())

    def __reduce__(self) -> tuple:
        return Deferred, (self._module, self._name, self._importer, self._idle)

    def __repr__(self) -> str:
        return f"<{self._path()}, not loaded>"


@dataclass(frozen=True)
class Rule:
    """Which imports wait.

    Attributes:
        importers: modules or packages (with all below) whose imports are meant.
        imports: modules or packages (with all below) to defer; `module:Pattern` is for names of a module (fnmatch).
        missing_too: also when the package is not installed, so that the importer can be loaded. Without it a missing
            package raises ImportError as ever, for importers that ask with `try`.
        only_missing: only when the package is not installed.
        in_functions: also imports inside functions, which otherwise are Python's.
        idle: `module:Name` of a function -> `Deferred.idle` for it.
    """

    importers: tuple[str, ...]
    imports: tuple[str, ...]
    missing_too: bool = False
    only_missing: bool = False
    in_functions: bool = False
    idle: Mapping[str, Callable[..., bool]] = field(default_factory=dict)

    def covers(self, module: str, name: str) -> bool:
        """Whether it is about an import of `name` from `module`."""
        if _below(module, self.imports):
            return True
        return any(fnmatchcase(f"{module}:{name}", pattern) for pattern in self.imports)


def defer(*rules: Rule) -> None:
    """Make the rules hold for every module imported from now on."""
    _RULES.extend(rules)
    _install()


def lazy(*packages: str) -> None:
    """Make every `__init__` of and below the packages that only re-exports load a name when it is asked for."""
    _LAZY.extend(packages)
    _install()


def on_import(module: str, hook: Callable[[types.ModuleType], None]) -> None:
    """Call the hook with the module once it has run and before its importer continues; now, if it has run already."""
    if module in sys.modules:
        hook(sys.modules[module])
    else:
        _HOOKS.setdefault(module, []).append(hook)
        _install()


def installed(package: str) -> bool:
    """Whether a top-level package can be found, without importing it."""
    if package in sys.modules:
        return sys.modules[package] is not None
    return importlib.util.find_spec(package) is not None


def executing() -> bool:
    """Whether a module that the rules name is in the middle of its import."""
    return _executing > 0


def is_deferred(value: object) -> TypeGuard[Deferred]:
    """Whether the value is a `Deferred`; `isinstance` cannot be asked, since `__class__` may be read from it."""
    return type(value) is Deferred


def reexports(package: str, source: str, submodules: Iterable[str]) -> dict[str, tuple[str, str]] | None:
    """What an `__init__` that only re-exports takes from where: name -> (module, name there); None for any other.

    A name that is also a submodule's would be hidden by it once that is imported, so such an `__init__` does not count.
    """
    table: dict[str, tuple[str, str]] = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.ImportFrom) and node.module and node.names[0].name != "*":
            module = importlib.util.resolve_name("." * node.level + node.module, package)
            for alias in node.names:
                table[alias.asname or alias.name] = module, alias.name
        elif isinstance(node, ast.Import) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
            continue  # `import a.b` for its side effects, and docstrings
        elif not (isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"):
            return None
    if package in dict(table.values()) or not table.keys().isdisjoint(submodules):
        return None
    return table


def _below(name: str, packages: Iterable[str]) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


class _Finder:
    """Finds the modules whose imports a rule covers, those with a hook, and the packages that may be lazy."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None, target: types.ModuleType | None = None) -> ModuleSpec | None:
        if name not in _HOOKS and not _below(name, _LAZY) and not _rules_of(name):
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec and type(spec.loader) is SourceFileLoader:
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


def _rules_of(importer: str) -> list[Rule]:
    return [rule for rule in _RULES if _below(importer, rule.importers)]


def _install() -> None:
    if _Finder not in sys.meta_path:
        sys.meta_path.insert(0, _Finder)


class _Loader(SourceFileLoader):
    """Runs a module with the `__import__` of its rules."""

    def exec_module(self, module: types.ModuleType) -> None:
        global _executing
        name = module.__name__
        table = None
        if self.is_package(name) and _below(name, _LAZY):
            submodules = (path.stem for path in Path(self.path).parent.iterdir())
            table = reexports(name, self.get_source(name) or "", submodules)
        if table:
            _make_lazy(module, table)
        else:
            rules = _rules_of(name)
            if rules:
                module.__dict__["__builtins__"] = builtins.__dict__ | {"__import__": _scoped_import(rules)}
            _executing += 1
            try:
                super().exec_module(module)
            finally:
                _executing -= 1
                module.__dict__["__builtins__"] = builtins.__dict__
        for hook in _HOOKS.pop(name, ()):
            hook(module)


def _make_lazy(module: types.ModuleType, table: dict[str, tuple[str, str]]) -> None:
    def load(name: str) -> object:
        if name not in table:
            raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")
        source, attribute = table[name]
        value = getattr(importlib.import_module(source), attribute)
        setattr(module, name, value)
        return value

    vars(module).update(__getattr__=load, __all__=list(table))


def _scoped_import(rules: list[Rule]) -> Callable[..., object]:
    real = builtins.__import__
    idle: dict[str, Callable[..., bool]] = {}
    for rule in rules:
        idle |= rule.idle

    def defers(module: str, name: str, in_function: bool) -> bool:
        for rule in rules:
            if in_function and not rule.in_functions:
                continue
            if not rule.covers(module, name):
                continue
            if rule.missing_too and not rule.only_missing:
                return True
            return installed(module.partition(".")[0]) != rule.only_missing
        return False

    def scoped(
        name: str,
        globals: Mapping[str, Any] | None = None,
        locals: Mapping[str, Any] | None = None,
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> object:
        # C code (PyImport_Import) passes a list, empty, and takes what it wants from sys.modules.
        if globals is None or isinstance(fromlist, list) or "*" in (fromlist or ()):
            return real(name, globals, locals, fromlist, level)
        importer = globals["__name__"]
        in_function = locals is not globals  # there `locals` is None, and a class body has the class's namespace
        if not fromlist:  # `import a.b` binds a, `import a.b as c` walks to b
            if defers(name, "", in_function):
                return Deferred(name.partition(".")[0], "", importer)
            return real(name, globals, locals, fromlist, level)
        source = importlib.util.resolve_name("." * level + name, globals["__package__"])
        waiting = [wanted for wanted in fromlist if defers(source, wanted, in_function)]
        if not waiting:
            return real(name, globals, locals, fromlist, level)
        names = types.SimpleNamespace()
        for wanted in waiting:
            setattr(names, wanted, Deferred(source, wanted, importer, idle.get(f"{source}:{wanted}")))
        now = tuple(wanted for wanted in fromlist if wanted not in waiting)
        if now:
            module = real(name, globals, locals, now, level)
            for wanted in now:
                setattr(names, wanted, getattr(module, wanted))
        return names

    return scoped
