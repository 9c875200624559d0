"""Run recipes and store what they return: `python -m posttrain.recipes.run FOLDER NAME...`, which resolve.py starts."""

import importlib
import json
import sys
from pathlib import Path

from posttrain.convert import single_process
from posttrain.recipes import catalog


def main() -> None:
    """Resolve the recipes given in sys.argv."""
    folder = Path(sys.argv[1])
    single_process.start()  # the patches, before Megatron
    from posttrain.recipes.description import Hub, describe, hide_package

    hide_package()
    hub = Hub()
    for name in sys.argv[2:]:
        recipe = catalog.find(name)
        function = getattr(importlib.import_module(recipe.module), recipe.name)
        description = describe(function, hub)
        (folder / f"{name}.json").write_text(json.dumps(description, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
