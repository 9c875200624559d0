"""From a run back to its command: `--rerun RUN` stands for the overrides that RUN was started with.

`--resume RUN` stands for the same in RUN's own directory, where training continues after the newest checkpoint.

What else is on the command line comes on top. A run directory may be anybody's, so its overrides have a file's rights,
not the command line's.
"""

import os
import shlex
import sys
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from posttrain.checkpoint import directories
from posttrain.cli.run_file import JOB_NAME
from posttrain.config import policy, yaml_file
from posttrain.config.overrides import format_override
from posttrain.errors import UserError
from posttrain.report.trials import Trial
from posttrain.utils import rundir
from posttrain.utils.escape import escape_control

RERUN, RESUME = "--rerun", "--resume"
RUN_DIR = "hydra.run.dir"
OVERRIDES = ".hydra/overrides.yaml"
SETTINGS = ".hydra/hydra.yaml"
CONFIG = "config.yaml"
TEXT = "posttrain.objectives.Text"  # the objective beside which a template was once accepted, and had no effect
PRINTS = {"--cfg", "-c", "--info", "-i"}  # options that print and end
NEVER = "run.resume=never"  # refuses to continue, which is what was asked for now


def expand(arguments: list[str], trains: bool = True) -> list[str]:
    """A command line with `--rerun RUN` or `--resume RUN` replaced by the overrides of RUN, but those given anew.

    Prints the overrides that it stands for.

    Args:
        arguments: of the command line.
        trains: whether it is of the command that trains; others, and options that print, ask about that.

    Raises:
        UserError: there is no such run, or its overrides can't be read or are not a file's to set.
    """
    arguments, option, run = _without_option(arguments)
    if run is None:
        return arguments
    root = Path(run)
    if not root.is_dir():
        raise UserError(f"{option} {run}: no such directory")
    overrides = [argument for argument in arguments if not argument.startswith("-")]
    given = set(map(_key, _parse(overrides)))
    kept = []
    ignored = _ignored(root, given)
    notes = []
    for override in _parse(_saved(root), f"{root / OVERRIDES}: "):
        if _key(override) in given or (option == RESUME and override.input_line == NEVER):
            continue
        if _key(override).partition(".")[0] in ignored:
            notes.append(f"{override.input_line}: has no effect with this objective and had none; it is left out")
            continue
        if override.is_sweep_override():
            raise UserError(f"{root / OVERRIDES}: {override.input_line}: is a sweep; a run has one value of each key")
        rule = policy.rule_of_override(override)
        if rule is not None:
            raise UserError(
                f"{root / OVERRIDES}: {override.input_line}: {rule.why}; it is taken from the command line, and from "
                "no file: give it again"
            )
        kept.append(str(override.input_line))
    _check_sources(root, arguments)
    file = _run_file(root)
    if file is not None and JOB_NAME not in given:
        kept.append(format_override(JOB_NAME, file))
    expanded = [*kept, *arguments]
    asks = not trains or bool(PRINTS & set(arguments))
    if option == RESUME:
        expanded = [*kept, *_in_place(root, arguments, given)]
        verb = "would continue" if asks else "continues"
        notes.append(f"{run} {verb} {_progress(root)}: {_shown(expanded, JOB_NAME, RUN_DIR)}")
    else:
        notes.append(f"{run} again: {_shown(expanded, JOB_NAME)}")
    if option == RERUN and not asks and _unfinished(root) and RUN_DIR not in given:
        continues = command_of(RESUME, run)
        notes.append(f"{run} has not finished; this starts at step 0. To continue {_progress(root)}: {continues}")
    if os.environ.get("RANK", "0") == "0":
        for note in notes:
            print(f"posttrain: {escape_control(note)}", file=sys.stderr)
    return expanded


def _shown(arguments: list[str], *without: str) -> str:
    """The overrides of a command line for a person, without some keys that this module and run_file add."""
    told = []
    for override in _parse([argument for argument in arguments if not argument.startswith("-")]):
        if _key(override) not in without:
            told.append(str(override.input_line))
    return shlex.join(told) or "no overrides"


def _ignored(root: Path, given: set[str]) -> tuple[str, ...]:
    """The groups of a run that its objective ignores: a command that chooses one of them is refused."""
    config = _read(root, CONFIG)
    if "objective" in given or not isinstance(config, dict):
        return ()
    objective = config.get("objective")
    is_text = isinstance(objective, dict) and objective.get("_target_") == TEXT
    return ("template",) if is_text else ()


def _in_place(root: Path, arguments: list[str], given: set[str]) -> list[str]:
    """The arguments with the directory of the run that is to continue in it.

    Raises:
        UserError: they ask for another directory, or for several runs.
    """
    if RUN_DIR in given:
        raise UserError(f"{RESUME}: continues in {root}; leave {RUN_DIR} out. A new run of the same kind: {RERUN}")
    if {"-m", "--multirun"} & set(arguments):
        raise UserError(f"{RESUME}: continues one run; leave --multirun out. A sweep continues by the same command")
    return [*arguments, format_override(RUN_DIR, str(root))]


def _unfinished(root: Path) -> bool:
    """Whether a run has begun and not come to its end."""
    return rundir.object_if_any(root, "status.json").get("state") not in (None, "finished", "pruned")


def _progress(root: Path) -> str:
    """From where a run continues."""
    checkpoint, skipped = directories.newest(root / "checkpoints")
    if checkpoint is None and skipped:
        return "from no step, since none of its checkpoints is whole"
    if checkpoint is None:
        return "from step 0, since it has no checkpoint"
    return f"after step {directories.step_of(checkpoint)}, its newest checkpoint"


def command_of(option: str, run: str = "RUN") -> str:
    """What to type for an option of this module."""
    return f"python -m posttrain {option} {shlex.quote(run)}"


def advice(folder: str) -> str:
    """What to write instead of an option that was given a run's folder; empty where it is none."""
    path = Path(folder)
    for run in (path, path.parent):
        if (run / OVERRIDES).is_file():
            return f"; to start that run again: {command_of(RERUN, str(run))}"
    return ""


def _without_option(arguments: list[str]) -> tuple[list[str], str, str | None]:
    """The other arguments, the option, and the run; None: neither option is there."""
    others: list[str] = []
    option = ""
    run = None
    rest = iter(arguments)
    for argument in rest:
        name, equals, value = argument.partition("=")
        if name not in (RERUN, RESUME):
            others.append(argument)
            continue
        if run is not None:
            raise UserError(f"{name}: one run at a time")
        option = name
        run = value if equals else next(rest, "")
        if not run:
            raise UserError(f"{option}: give the directory of a run: {command_of(option)}")
    return others, option, run


def _saved(root: Path) -> list[str]:
    """The overrides that a run was started with."""
    values = _read(root, OVERRIDES)
    if values is None:
        raise UserError(f"{root}: has no {OVERRIDES}; give the directory of a run, of a sweep that of one trial")
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise UserError(f"{root / OVERRIDES}: damaged: expected a list of overrides, each a text")
    return values


def _read(root: Path, name: str) -> Any:
    """The value of a YAML file of a run; None where there is no such file."""
    try:
        text = rundir.read_text(root, name)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except UnicodeDecodeError:
        raise UserError(f"{root / name}: damaged: is not UTF-8") from None
    return yaml_file.parse_text(text, root / name)


def _run_file(root: Path) -> str | None:
    """The name of the YAML file with which the settings of a run began; None: there was none."""
    name = Trial(root.name, root, {}).file
    if name is None or "${" in name or not name.isprintable():  # anybody's text, which Hydra would look into
        return None
    return name


def _parse(overrides: list[str], place: str = "") -> list[Override]:
    parser = OverridesParser.create()
    parsed = []
    for override in overrides:
        try:
            parsed.append(parser.parse_override(override))
        except HydraException:
            if place:  # what is on the command line Hydra explains itself; a folder of --config-dir is none
                raise UserError(f"{place}{escape_control(override[:200])}: can't be read as KEY=VALUE") from None
    return parsed


def _key(override: Override) -> str:
    """The key or group of an override, a group's path in dots."""
    return str(override.key_or_group).replace("/", ".")


def _check_sources(root: Path, arguments: list[str]) -> None:
    """Refuse a run of files that the overrides don't name, unless they are given again."""
    values = _read(root, SETTINGS)
    if values is None:  # Hydra left no record
        return
    try:
        hydra = OmegaConf.create({"file": values}).file.hydra
        name = str(hydra.job.config_name)
        folders = [source.path for source in hydra.runtime.config_sources if source.provider == "command-line"]
    except (AttributeError, TypeError, OmegaConfBaseException):
        raise UserError(f"{root / SETTINGS}: damaged: it says which files the run was made of") from None
    if not folders:
        return
    if not any(argument.startswith(("--config-d", "-cd")) for argument in arguments):
        raise UserError(f"{root}: was started with --config-dir {folders[0]}; give it again")
    shipped = (policy.SHIPPED / f"{name}.yaml").is_file()
    if not shipped and not any(argument.startswith(("--config-n", "-cn")) for argument in arguments):
        raise UserError(f"{root}: was started with --config-name {name}; give it again")
