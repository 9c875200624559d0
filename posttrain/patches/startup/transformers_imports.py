"""What transformers does while it is imported, and nobody here needs."""

import importlib.metadata
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from types import ModuleType

from posttrain.patches.deferred import Rule, defer, on_import
from posttrain.patches.registry import Kind, patch, replace


class Providers(Mapping[str, list[str]]):
    """Top-level package -> distributions that provide it, as `importlib.metadata.packages_distributions` tells.

    A distribution of the package's own name is found by itself; only for other names are all of them read.
    """

    def __init__(self, read_all: Callable[[], Mapping[str, list[str]]]) -> None:
        self._read_all = read_all

    @cached_property
    def all(self) -> Mapping[str, list[str]]:
        """The whole table."""
        return self._read_all()

    def __getitem__(self, package: str) -> list[str]:
        try:
            return [importlib.metadata.distribution(package).name]
        except (importlib.metadata.PackageNotFoundError, ValueError):
            return self.all[package]

    def __iter__(self) -> Iterator[str]:
        return iter(self.all)

    def __len__(self) -> int:
        return len(self.all)


@patch(
    "transformers-imports",
    kind=Kind.STARTUP,
    symptom="transformers reads every installed distribution's list of files (0.6 s) and writes docstrings, for which "
    "the tokenizers' automatic class imports all model classes, SciPy and scikit-learn; a configuration's validators "
    "import torchvision (5 s together)",
    versions={"transformers": ">=5.8,<5.13"},
)
def light_transformers() -> None:
    """Leave the docstrings as they are; look distributions up when asked; leave model classes until one is used."""
    defer(
        # A tokenizer's automatic class shares a module with the models', which names the mixin of those that generate.
        Rule(("transformers.models.auto.auto_factory",), ("transformers.generation:GenerationMixin",)),
        # A configuration's validators lead to the images', and torchvision to Dynamo.
        Rule(("transformers.image_utils", "transformers.video_utils"), ("torchvision",)),
        # One curve of an assistant model's thresholds.
        Rule(("transformers.generation.candidate_generator",), ("sklearn",)),
    )
    read_all = importlib.metadata.packages_distributions
    replace(importlib.metadata, packages_distributions=lambda: Providers(read_all))

    def undocumented(module: ModuleType) -> None:
        def auto_docstring(decorated: object = None, **unused: object) -> object:
            return decorated if decorated is not None else lambda decorated: decorated

        replace(module, auto_docstring=auto_docstring)

    on_import("transformers.utils.auto_docstring", undocumented)
