"""What a group's keys mean: `python -m posttrain.options GROUP`, each with its default and the comment of its file.

    python -m posttrain.options trainer
    python -m posttrain.options data=custom
    python -m posttrain.options hydra/launcher
    python -m posttrain.options trainer.early_stopping

Without a group: their names, with their choices. The keys are those of the files in conf/, which the comments are from.
"""

import sys
import textwrap
from collections.abc import Iterator, Sequence

from posttrain.cli import conf_options, help_screen
from posttrain.config.composition import CONF_DIR
from posttrain.errors import UserError
from posttrain.utils import stop
from posttrain.utils.stop import fail
from posttrain.utils.suggest import did_you_mean

USAGE = "usage: python -m posttrain.options [GROUP | GROUP=CHOICE | KEY]"
MOST_CHOICES = 6  # that are named beside a key which not all of them have


@stop.command
def main() -> None:
    """Entry point; exits with 2 after a user's mistake."""
    arguments = [argument for argument in sys.argv[1:] if argument not in ("--help", "-h")]
    if not arguments and len(sys.argv) > 1:
        print(f"{USAGE}\n\n{__doc__}")
        return
    try:
        if len(arguments) > 1:
            raise UserError(USAGE)
        print("\n".join(describe(arguments[0]) if arguments else overview()))
    except UserError as error:
        fail(str(error))


def overview() -> Iterator[str]:
    """A line for each group and section of keys."""
    yield USAGE
    yield ""
    for group in groups():
        default = conf_options.default_choice(CONF_DIR, group)
        count = len(help_screen.option_names(CONF_DIR / group))
        text = f"{count} choices" if count > 1 else "one choice"
        if default:
            text += f", by default {default}"
        yield f"  {group:16} {text}"
    for section in conf_options.sections(CONF_DIR):
        yield f"  {section:16} not chosen: its keys are in conf/config.yaml"


def groups() -> list[str]:
    """The groups of which a choice can be made."""
    return [*help_screen.groups(CONF_DIR), "hydra/launcher"]


def describe(name: str) -> Iterator[str]:
    """The choices of a group and its keys, or those of one choice, or a key and what is below it.

    Args:
        name: `trainer`, `data=custom`, `trainer.early_stopping`; hydra.launcher is hydra/launcher.

    Raises:
        UserError: there is no such group, choice or key.
    """
    name, _, choice = name.partition("=")
    group = conf_options.group_of(CONF_DIR, name)
    if group is None:
        names = [*groups(), *conf_options.sections(CONF_DIR)]
        nearest = did_you_mean(name, names).removesuffix("?")
        raise UserError(f"{name}: no group of keys{nearest}; there are {', '.join(names)}")
    key, prefix = name.replace("/", "."), group.replace("/", ".")
    choices = help_screen.option_names(CONF_DIR / group)
    if choice and choice not in choices:
        nearest = did_you_mean(choice, choices).removesuffix("?")
        raise UserError(f"{group}={choice}: no such choice{nearest}; there are {', '.join(choices)}")
    if key == prefix:
        yield from _choices(group, [choice] if choice else choices)
    if choice:
        for option in conf_options.of_choice(CONF_DIR, group, choice):
            yield from help_screen.option_lines(option)
        return
    found = conf_options.of_group(CONF_DIR, group)
    below = [one for one in found if f"{one.option.key}.".startswith(f"{key}.")]
    if not below and key != prefix:
        nearest = did_you_mean(key, [one.option.key for one in found]).removesuffix("?")
        raise UserError(f"{name}: no such key{nearest}; all of them: python -m posttrain options {group}")
    for one in below:
        yield from help_screen.option_lines(one.option, _only_in(one.choices, choices))


def _choices(group: str, choices: Sequence[str]) -> Iterator[str]:
    """The choices of a group, each with what its file says it is for."""
    default = conf_options.default_choice(CONF_DIR, group)
    for choice in choices:
        mark = " (default)" if choice == default else ""
        text = conf_options.header(CONF_DIR / group / f"{choice}.yaml")
        yield f"{group}={choice}{mark}"
        yield from textwrap.wrap(text, help_screen.COLUMNS, initial_indent="    ", subsequent_indent="    ")
    if choices:
        yield ""


def _only_in(having: Sequence[str], choices: Sequence[str]) -> str:
    """Which choices have a key; empty where all do."""
    if len(having) >= len(choices):
        return ""
    if len(having) > MOST_CHOICES:
        return f"{len(having)} of {len(choices)} choices"
    return ", ".join(having)


if __name__ == "__main__":
    main()
