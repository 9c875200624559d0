"""Run a task with the configuration that a command line asks for: recipes, checks ahead, Hydra, errors in one line."""

import functools
import os
import re
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.utils import get_args_parser
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from posttrain import sweep
from posttrain.cli import conf_options, cpu_sizes, data_format, help_screen, rerun, run_file
from posttrain.cli.precheck import check_ahead, split_overrides
from posttrain.config import composition as config
from posttrain.config import hydra_guard, synonyms
from posttrain.config.overrides import format_override, list_globs, quote_expressions
from posttrain.errors import RunFailed, UserError, location_error
from posttrain.recipes import layer
from posttrain.sweep.optuna import set_defaults as set_optuna_defaults
from posttrain.utils import stop, working
from posttrain.utils.stop import FULL_ERROR, fail
from posttrain.utils.suggest import did_you_mean

PRINTS = rerun.PRINTS | {"--hydra-help", "--shell-completion", "-sc"}  # options that print and end
# Of a command that doesn't train: what it is asked about is a run whose directory isn't to be made now.
WITHOUT_RUN = ("hydra.run.dir=.", "hydra.output_subdir=null")
UNDECODED = re.compile("[\udc80-\udcff]")  # what Python makes of bytes that its encoding doesn't have


def compose(overrides: list[str] | None = None, config_name: str = "config", with_hydra: bool = False) -> DictConfig:
    """As posttrain.config.composition.compose, with the recipe that `recipe=` names below everything else.

    Raises:
        UserError: for what `run` would report with exit code 2.
    """
    layered = layer.apply(quote_expressions(overrides or []), config_name)
    added = data_format.choose(layered.words, layered.config_name).overrides
    return _compose_layered([*layered.words, *added], layered.config_name, with_hydra)


def _compose_layered(words: list[str], config_name: str, with_hydra: bool) -> DictConfig:
    """Compose a command line whose recipe and data format are already in it."""
    cfg = config.compose(words, config_name, with_hydra)
    layer.check(cfg, words)
    return cfg


def typed_overrides() -> list[str]:
    """The overrides in sys.argv, with the folder of --config-dir as one of them: what `compose` takes.

    Those that the name of a run's file, `--rerun RUN` or `--resume RUN` stand for are put into sys.argv instead of it.
    Ends the command where an option isn't known.
    """
    _expand(trains=False)
    _refuse_unknown_options(sys.argv[1:])
    overrides, extra = split_overrides(get_args_parser().parse_intermixed_args(sys.argv[1:]))
    return [*overrides, *extra]


def name_words(words: Sequence[str], keys: Sequence[str]) -> list[str]:
    """The arguments of a command line, those that are neither overrides, options nor files as values of `keys` in turn.

    Raises:
        UserError: there are more of them than keys.
    """
    left = list(keys)
    named = []
    before = ""
    for word in words:
        is_override = "=" in word and not _is_place(word)
        is_own = is_override or word.startswith(("-", "~")) or word.endswith(run_file.ENDINGS)
        if not is_own and not run_file.TAKE_A_VALUE.fullmatch(before):
            if not left:
                raise UserError(f"{word}: is one argument too many")
            named.append(format_override(left.pop(0), word))
        else:
            named.append(word)
        before = word
    return named


def _is_place(word: str) -> bool:
    """Whether a word with `=` is a directory's, as those of a sweep's trials are (`lr=0.1`), and no override."""
    return word.startswith(("/", "./", "../")) or Path(word).is_dir()


def show_help(docstring: str, config_name: str, keys: Collection[str] | None = None) -> None:
    """Print what a command says of itself, and the options of its own in conf/.

    Args:
        docstring: of the command.
        config_name: of its file in conf/.
        keys: that it has of that file; None: all.
    """
    options = help_screen.options(config.CONF_DIR / f"{config_name}.yaml", keys)
    print(f"{docstring.strip()}\n\nOptions:\n\n{options}")


def run(
    task: Callable[[DictConfig], Any],
    config_name: str = "config",
    check: Callable[[DictConfig], None] | None = None,
    checked: Callable[[], None] | None = None,
    sized: bool = False,
) -> None:
    """Run `task` with the configuration that sys.argv asks for, once `check` has nothing against it.

    `checked` is called when all of a command's configurations have passed, before there is a directory for any.

    `sized` says that the command trains, or shows what training would do: sizes that are left to this machine are
    chosen (see `cpu_sizes`).

    Never returns after an error.

    `--rerun RUN` and `--resume RUN` are replaced by the overrides of that run (see `rerun.expand`), and the name of a
    YAML file by those in it (`run_file.expand`).

    A mistake of the user's is printed as one message and exits with 2. HYDRA_FULL_ERROR=1 shows the traceback.
    """
    trains = config_name == "config"
    _expand(trains)
    # argparse refuses options between overrides (`model=x --multirun optimizer.lr=1,2`): a stable sort puts them first.
    sys.argv[1:] = sorted(sys.argv[1:], key=lambda arg: not arg.startswith("-") and ("=" in arg or arg.startswith("~")))
    for position, arg in enumerate(sys.argv[1:], 2):
        value = arg.partition("=")[2] or "".join(sys.argv[position : position + 1])
        if arg.startswith("--experimental-rerun"):
            again = rerun.command_of(rerun.RERUN)
            fail(f"--experimental-rerun: refused, it unpickles the file it is given; a run again: {again}")
        if arg.startswith(("--config-p", "-cp")):
            fail(
                "--config-path: refused, files of your own go beside the shipped ones: --config-dir FOLDER"
                f"{rerun.advice(value)}"
            )
        if arg.startswith(("--config-d", "-cd")) and rerun.advice(value):
            fail(f"--config-dir: {value} is a run's folder, of which nothing would be used{rerun.advice(value)}")
        if UNDECODED.search(arg):
            fail(f"{arg}: is not UTF-8; rename the file. If it is, and the locale is another: set PYTHONUTF8=1")
    _refuse_unknown_options(sys.argv[1:])
    if config_name != "config" and {"-m", "--multirun"} & set(sys.argv[1:]):
        fail("--multirun: sweeps over trainings alone; run this command once for each")
    if not set(sys.argv[1:]) & PRINTS:
        working.begin(working.READING)
    before = os.environ.get(FULL_ERROR)
    full = before == "1"
    # Hydra's own report would print a traceback and exit with 1; with this it re-raises and we report.
    os.environ[FULL_ERROR] = "1"
    try:
        hydra_guard.install(config_name)
        layered = layer.apply(sys.argv[1:], config_name)
        sys.argv[1:], config_name = layered.words, layered.config_name
        hydra_guard.install(config_name)
        if layered.note and os.environ.get("RANK", "0") == "0":
            print(f"posttrain: {layered.note}", file=sys.stderr)
        set_optuna_defaults(sys.argv[1:])
        sys.argv[1:] = data_format.complete(sys.argv[1:], config_name)
        if check:
            check_ahead(lambda overrides: _compose_layered(overrides, config_name, with_hydra=True), check)
        if checked:
            checked()
        if sized and not layered.note:
            sys.argv[1:] = cpu_sizes.complete(sys.argv[1:], config_name)
        if not trains:
            sys.argv[1:] += WITHOUT_RUN
        working.phase("composing")
        try:
            single = not {"-m", "--multirun"} & set(sys.argv[1:])
            with_hydra = hydra.main(version_base="1.3", config_path=str(config.CONF_DIR), config_name=config_name)
            errors: list[Exception] = []
            with_hydra(_collecting(task, errors) if single else task)()
            if errors:
                raise errors[0]
        finally:
            sweep.summarize()
    except (UserError, RunFailed) as error:
        if full:
            raise
        fail(run_file.located(str(error)), error.exit_code)
    except (HydraException, OmegaConfBaseException) as error:
        if full:
            raise
        explanation = config.explain(error, [arg for arg in sys.argv[1:] if not arg.startswith("-")], config_name)
        fail(run_file.located(explanation))
    except OSError as error:
        message = location_error(error)
        if full or message is None:
            raise
        fail(message)
    except KeyboardInterrupt as error:
        stop.exit_for(error)
    finally:
        os.environ.pop(FULL_ERROR, None)
        if before is not None:
            os.environ[FULL_ERROR] = before


def _expand(trains: bool) -> None:
    """Replace in sys.argv what stands for overrides; nothing is left of it to be replaced again."""
    try:
        arguments = rerun.expand(run_file.expand(quote_expressions(sys.argv[1:])), trains)
        known, _ = get_args_parser().parse_known_args(arguments)
        folders = [config.CONF_DIR, *map(Path, filter(None, [known.config_dir]))]
        sys.argv[1:] = list_globs(arguments, folders)
    except UserError as error:
        fail(str(error))


def _refuse_unknown_options(arguments: list[str]) -> None:
    """End the command where an option isn't Hydra's, with what it is here: most are settings."""
    known, unknown = get_args_parser().parse_known_args(arguments)
    for option in unknown:
        if option.startswith("-"):
            key = option.lstrip("-").partition("=")[0].replace("-", "_")
            advice = synonyms.advice_on_key(key) or did_you_mean(key, conf_options.keys(config.CONF_DIR))
            fail(f"{option}: no such option{advice}; settings are written KEY=VALUE, without dashes: --help")
    if known.multirun and (known.cfg or known.info):
        fail("--multirun: --cfg and --info are about one run; leave it out")


def _collecting(task: Callable[[DictConfig], Any], errors: list[Exception]) -> Callable[[DictConfig], Any]:
    """`task` with our own errors appended to `errors`: Hydra would print a line about them before we do."""

    @functools.wraps(task)
    def quiet(cfg: DictConfig) -> Any:
        try:
            return task(cfg)
        except (UserError, RunFailed, OSError) as error:
            errors.append(error)
            return None

    return quiet
