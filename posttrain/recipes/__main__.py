"""`python -m posttrain.recipes [NAME]`: list the recipes, or show one of them key by key."""

import sys

from posttrain.config.overrides import format_override
from posttrain.errors import RunFailed, UserError
from posttrain.recipes import catalog, resolve
from posttrain.recipes.translate import Translation, translate_recipe
from posttrain.utils import stop
from posttrain.utils.stop import fail


def format_recipe(recipe: catalog.Recipe, translation: Translation) -> str:
    """One recipe, key by key."""
    lines = [
        f"{recipe.name}: {recipe.summary}",
        f"{recipe.module}, Megatron-Bridge {catalog.version()}",
        "",
    ]
    for group, name in translation.choices.items():
        lines.append(format_override(group, name))
    for key, value in sorted(translation.values.items()):
        lines.append(format_override(key, value))
    lines += ["", "Decided by posttrain, for the machine or with the choices above:"]
    for item in translation.decided:
        lines.append(f"  {item}")
    lines += ["", "Not carried over:"]
    for item in translation.left_out:
        lines.append(f"  {item}")
    return "\n".join(lines)


def show_recipe(name: str) -> None:
    """Print one recipe.

    Raises:
        UserError: there is no such recipe, or it raises an error.
    """
    recipe = catalog.find(name)
    resolved = resolve.resolve_recipe(recipe)
    print(format_recipe(recipe, translate_recipe(recipe.name, resolved, model_chosen=True)))
    if resolved["option"] is None:
        hub = resolved["hub"]
        print(f"\nconf/model does not have {hub}: add model=hf model.path={hub}, or a different model.")


@stop.command
def main() -> None:
    """List the recipes, or show the one given."""
    args = sys.argv[1:]
    if "-h" in args or "--help" in args:
        print(__doc__)
        raise SystemExit(0)
    if len(args) > 1:
        print(__doc__)
        raise SystemExit(2)
    try:
        if args in ([], ["list"]):
            print(catalog.format_list())
        else:
            show_recipe(args[0])
    except (UserError, RunFailed) as error:
        fail(str(error), error.exit_code)


if __name__ == "__main__":
    main()
