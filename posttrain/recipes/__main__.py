"""`python -m posttrain.recipes [NAME]`: the recipes that a run can start from, or one of them key by key."""

import sys

from posttrain.compose import fail
from posttrain.errors import RunFailed, UserError
from posttrain.recipes import names, resolve
from posttrain.recipes.translate import Translation, translate
from posttrain.words import word


def listing() -> str:
    """Every recipe for text models with what it is, by the folder that it comes from."""
    text = [recipe for recipe in names.recipes().values() if recipe.text]
    width = max(len(recipe.name) for recipe in text)
    lines = [f"{len(text)} recipes of Megatron-Bridge {names.version()}; start from one with recipe.name=NAME\n"]
    lines += [f"{recipe.name:<{width}}  {recipe.summary}" for recipe in text]
    others = len(names.recipes()) - len(text)
    lines.append(f"\n{others} more train models of images, sound or video, and can't be used here.")
    return "\n".join(lines)


def page(recipe: names.Recipe, done: Translation) -> str:
    """One recipe, key by key."""
    lines = [f"{recipe.name}: {recipe.summary}", f"{recipe.module}, Megatron-Bridge {names.version()}", ""]
    lines += [word(group, name) for group, name in done.choices.items()]
    lines += [word(key, value) for key, value in sorted(done.values.items())]
    for title, items in (
        ("Decided by posttrain, for the machine or with the choices above:", done.decided),
        ("Not carried over:", done.left_out),
    ):
        lines += ["", title, *(f"  {item}" for item in items)]
    return "\n".join(lines)


def main() -> None:
    """List the recipes, or show the one named."""
    args = sys.argv[1:]
    if {"-h", "--help"} & set(args) or len(args) > 1:
        print(__doc__)
        raise SystemExit(0 if {"-h", "--help"} & set(args) else 2)
    try:
        if args in ([], ["list"]):
            return print(listing())
        recipe = names.find(args[0])
        found = resolve.resolved(recipe)
        print(page(recipe, translate(recipe.name, found, model_chosen=True)))
        if found["option"] is None:
            print(
                f"\nconf/model does not have {found['hub']}: add model=hf model.path={found['hub']}, or another model."
            )
    except (UserError, RunFailed) as error:
        fail(str(error), error.exit_code)


if __name__ == "__main__":
    main()
