"""Every recipe of the installed Megatron-Bridge, resolved once for all tests here (25 s of a quiet core)."""

import shutil
from pathlib import Path

import pytest

from posttrain.recipes import catalog, resolve


@pytest.fixture(scope="session")
def recipe_cache(tmp_path_factory) -> Path:
    """A cache that holds all recipes for text models."""
    cache, written = tmp_path_factory.mktemp("cache"), tmp_path_factory.mktemp("written")
    recipes = [recipe for recipe in catalog.recipes().values() if recipe.text]
    resolve.run_recipes(written, [recipe.name for recipe in recipes])
    for recipe in recipes:
        folder = resolve.cache_folder(recipe, cache)
        folder.mkdir(parents=True)
        shutil.move(written / f"{recipe.name}.json", folder)
    return cache


@pytest.fixture
def cached(recipe_cache, monkeypatch) -> Path:
    """The same as this process's cache."""
    monkeypatch.setenv("POSTTRAIN_CACHE", str(recipe_cache))
    return recipe_cache
