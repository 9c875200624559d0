"""The format of `data.path=FILE` where nothing chooses one: what its columns say becomes overrides of the command line.

So the configuration of a run, and a run again, has the format's name in it, as if it had been typed.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from hydra._internal.utils import get_args_parser
from omegaconf import DictConfig

from posttrain.cli.precheck import split_overrides, trials
from posttrain.config.composition import CONF_DIR, compose
from posttrain.data import detection
from posttrain.data.readers import FileOptions
from posttrain.errors import UserError
from posttrain.utils.cache import cache_root
from posttrain.utils.escape import escape_control

DEFAULT = "demo"  # the choice of `data` where nobody has one
OF_READY_RUNS = "messages"  # that of the ready runs in conf/experiment, which any other may take the place of
PATH = "data.path"
# What can name a file: the command line, or an experiment of the user's.
NAMES_A_FILE = (PATH, "experiment", "+experiment")


@dataclass(frozen=True)
class Choice:
    """What a command line leaves to the files.

    Attributes:
        overrides: that choose the format; empty: nothing is left.
        note: which, and how to choose another.
    """

    overrides: tuple[str, ...] = ()
    note: str = ""


NOTHING = Choice()


def complete(arguments: Sequence[str], config_name: str) -> list[str]:
    """The arguments of a command with the overrides that choose the format of their files, which are said.

    Args:
        arguments: of the command line.
        config_name: what the command composes.

    Raises:
        UserError: a file can't be read, or its columns don't say its format; or a sweep's files differ in it.
    """
    args = get_args_parser().parse_args(list(arguments))
    if args.help or args.hydra_help or args.shell_completion or args.config_name:
        return list(arguments)
    overrides, extra = split_overrides(args)
    points = trials(overrides) if args.multirun else [overrides]
    choices: dict[str, Choice] = {}  # by the path, which a sweep may have several of
    for point in points:
        path = next((override for override in point if _key(override) == PATH), "")
        if path not in choices:
            choices[path] = choose([*point, *extra], config_name)
    if len({choice.overrides for choice in choices.values()}) > 1:
        notes = "; ".join(choice.note or "chosen already" for choice in choices.values())
        raise UserError(f"{PATH}: the files of this sweep differ in their format: {notes}; choose one with data=")
    if not choices:
        return list(arguments)
    choice = next(iter(choices.values()))
    if choice.note and os.environ.get("RANK", "0") == "0":
        print(f"posttrain: {escape_control(choice.note)}", file=sys.stderr, flush=True)
    return [*arguments, *choice.overrides]


def choose(overrides: Sequence[str], config_name: str) -> Choice:
    """What chooses the format of the files that overrides name, if nothing else does.

    Raises:
        UserError: see `complete`.
    """
    keys = {_key(override) for override in overrides}
    if "data" in keys or not keys & set(NAMES_A_FILE):
        return NOTHING
    try:
        cfg = compose(list(overrides), config_name, with_hydra=True)
    except UserError:
        return NOTHING  # it is said where the command composes
    data = cfg.data
    choices = cfg.hydra.runtime.choices
    of_ready_run = _is_of_ready_run(choices) and PATH in keys
    if not of_ready_run and (choices.get("data") != DEFAULT or not data.path or "demo:" in str(data.path)):
        return NOTHING
    path = data.path if isinstance(data.path, str) else list(data.path)
    options = FileOptions(data.encoding, data.delimiter, data.sheet)
    match = detection.detect(path, options, cache_root(cfg.cache_dir))
    if of_ready_run and match.overrides[0] in (f"data={OF_READY_RUNS}", "objective=text"):
        return NOTHING
    added = tuple(override for override in match.overrides if _key(override) not in keys)
    columns = ", ".join(match.columns)
    note = f"{PATH}={data.path}: {match.name}, by {columns} ({' '.join(added)}); another format: data=NAME"
    return Choice(added, note)


def _is_of_ready_run(choices: DictConfig) -> bool:
    """Whether `data` is chosen by an experiment of this project's, which can't know the user's file."""
    experiment = CONF_DIR / "experiment" / f"{choices.get('experiment')}.yaml"
    return choices.get("data") == OF_READY_RUNS and experiment.is_file()


def _key(override: str) -> str:
    return override.lstrip("+~").partition("=")[0]
