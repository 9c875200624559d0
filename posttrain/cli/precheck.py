"""Check what a command would run before Hydra makes a directory for it: every trial of a grid, not just the first."""

import itertools
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import OverrideType
from omegaconf import DictConfig

from posttrain.errors import UserError
from posttrain.utils import working

MOST_TRIALS = 64  # of a grid that are composed ahead (0.1 s each); the others are checked when their turn comes
KEPT = ("hydra.launcher.", "hydra.sweeper.", "hydra.run.dir=", "hydra.sweep.dir=")  # of Hydra's own settings


def check_ahead(compose: Callable[[list[str]], DictConfig], check: Callable[[DictConfig], None]) -> None:
    """Compose and check each configuration that sys.argv asks to run.

    Args:
        compose: overrides -> configuration, with `hydra`.
        check: raises UserError for a wrong one.
    """
    args = get_args_parser().parse_args(sys.argv[1:])
    if args.help or args.hydra_help or args.cfg or args.info or args.shell_completion or args.config_name:
        return
    overrides, extra = split_overrides(args)
    if not args.multirun:
        working.phase("checking")
        check(compose([*overrides, *extra]))
        return
    space = _space(compose, overrides, extra)
    for number, trial in enumerate(trials([*space, *overrides]), 1):
        working.phase(f"checking trial {number}")
        try:
            check(compose([*trial, *extra]))
        except UserError as error:
            swept = [item for item in trial if item not in overrides]  # values of a file's space as well
            if not swept:
                raise
            raise UserError(f"trial {' '.join(swept)}: {error}") from error


def _space(compose: Callable[[list[str]], DictConfig], overrides: list[str], extra: list[str]) -> list[str]:
    """What a file sweeps (`hydra.sweeper.params`), as overrides; without the keys that the command line has."""
    working.phase("checking")
    try:
        params = compose([*next(trials(overrides)), *extra]).hydra.sweeper.get("params")
    except UserError:  # it comes again of the trial itself
        return []
    given = {override.lstrip("+~").partition("=")[0] for override in overrides}
    return [f"{key}={value}" for key, value in (params or {}).items() if key not in given]


def split_overrides(args: Namespace) -> tuple[list[str], list[str]]:
    """The overrides of a command line, and the one that says where --config-dir is.

    Of Hydra's own settings those of the launcher and the sweeper, and the places that a run writes to.
    """
    extra = []
    if args.config_dir:
        extra.append(f"hydra.searchpath=[file://{args.config_dir}]")
    overrides = []
    for item in args.overrides:
        plain = item.lstrip("+~")
        if plain.startswith(KEPT) or not plain.startswith("hydra."):
            overrides.append(item)
    return overrides, extra


def trials(overrides: list[str]) -> Iterator[list[str]]:
    """The override lists of a grid's first trials; a search's ranges (`interval(...)`) are left to the sweeper."""
    parsed = OverridesParser.create().parse_overrides(overrides)
    axes: list[list[str]] = []
    for override, item in zip(overrides, parsed, strict=True):
        if not item.is_sweep_override():
            axes.append([override])
        elif item.is_discrete_sweep() and item.type is not OverrideType.DEL:
            key = item.get_key_element()
            axes.append([f"{key}={value}" for value in item.sweep_string_iterator()])
    for point in itertools.islice(itertools.product(*axes), MOST_TRIALS):
        yield list(point)
