"""Import a Primus configuration: `python -m posttrain.primus FILE.yaml [OVERRIDES]`.

    # writes ./conf/experiment/qwen3_lora.yaml
    python -m posttrain.primus qwen3_lora.yaml
    # writes mine/experiment/qwen3_lora.yaml
    python -m posttrain.primus qwen3_lora.yaml --config-dir mine
    python -m posttrain.primus sft.yaml out=run.yaml model=llama3_8b data=alpaca data.path=my.json

FILE has framework megatron_bridge, in either form: sections (model, training, lora, data, ...) or
modules.post_trainer.overrides. ${VARIABLE:default} is the environment's value, else the default.
The command prints what has no counterpart, and the command lines that run the result. OVERRIDES add
what the file does not set, or replace what it sets; they are put on the command line, not into the
experiment. overwrite=true replaces an existing file.
"""

import re
import sys
from pathlib import Path

from posttrain.cli.command import compose
from posttrain.config.composition import CONF_DIR
from posttrain.config.overrides import format_override
from posttrain.errors import UserError, location_error
from posttrain.primus import experiment
from posttrain.primus.read import Primus, read_primus
from posttrain.primus.translate import Translation, translate_primus
from posttrain.recipes import catalog
from posttrain.spec import checks
from posttrain.utils import stop
from posttrain.utils.atomic_files import write_text
from posttrain.utils.escape import escape_control
from posttrain.utils.gpus import visible_gpus
from posttrain.utils.output_paths import check_directory
from posttrain.utils.stop import fail
from posttrain.utils.user_paths import expand_home

OPTIONS = ("out", "overwrite")  # of this command; everything else is an override


@stop.command
def main() -> None:
    """Entry point; exits with 2 after a user's mistake."""
    arguments = sys.argv[1:]
    if not arguments or {"-h", "--help"} & set(arguments):
        print(__doc__.strip())
        raise SystemExit(0 if arguments else 2)
    try:
        print(escape_control(import_config(arguments)))
    except UserError as error:
        fail(str(error))
    except OSError as error:
        message = location_error(error)
        if message is None:
            raise
        fail(message)


def import_config(arguments: list[str]) -> str:
    """Read, translate, write and check.

    Args:
        arguments: of the command line.

    Returns:
        A report for the user.

    Raises:
        UserError: the file can't be imported, or the overrides are wrong.
    """
    folder, arguments = _config_dir(arguments)
    files, overrides, options = [], [], {}
    for argument in arguments:
        key, is_override, value = argument.partition("=")
        if not is_override:
            files.append(argument)
        elif key in OPTIONS:
            options[key] = value
        else:
            overrides.append(argument)
    if len(files) != 1:
        raise UserError(f"expected exactly one Primus file, got: {' '.join(files) or 'none'}")
    primus = read_primus(expand_home(files[0]))
    model_chosen = any(override.startswith("model=") for override in overrides)
    translation = translate_primus(primus, model_chosen)
    _drop_overridden(translation, overrides)

    out = folder / "experiment" / f"{file_name(primus)}.yaml"
    if "out" in options:
        out = expand_home(options["out"])
    if out.exists() and options.get("overwrite") != "true":
        raise UserError(f"{out}: already exists; add overwrite=true, or out=FILE")
    check_directory(out.parent, "out", out)
    # Before anything is written.
    cfg = compose([*experiment.format_overrides(translation), *overrides])
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, experiment.format_file(primus, translation))
    try:
        checks.check(cfg, visible_gpus())
        verdict = "checked: it composes and passes every check on this machine"
    except UserError as error:
        verdict = f"it composes; before it can run on this machine: {error}"
    return format_report(translation, out, overrides, verdict)


def format_report(translation: Translation, out: Path, overrides: list[str], verdict: str) -> str:
    """What was written, what has no counterpart, and how to run it."""
    lines = [f"written: {out}", verdict]
    if translation.left_out:
        lines.append("no counterpart:")
        lines += [f"  {line}" for line in translation.left_out]
    recipe = recipe_alias(translation)
    if recipe:
        lines.append(
            "values that the file leaves to Megatron-Bridge's recipe are this project's defaults; "
            f"for the recipe's, add recipe={recipe}"
        )
    if translation.run_dir:
        overrides = [*overrides, format_override("hydra.run.dir", translation.run_dir)]
    if out.parent.name == "experiment":
        config_dir = out.parent.parent
        arguments = [format_override("experiment", out.stem), *overrides]
        if config_dir.resolve() != CONF_DIR:
            arguments = ["--config-dir", str(config_dir), *arguments]
        lines += ["run it:", f"  {experiment.format_command(arguments)}"]
    else:
        lines.append(
            "to run it, move the file into a folder named experiment and pass that folder's parent: --config-dir"
        )
    whole = [*experiment.format_overrides(translation), *overrides]
    lines += ["the same without the file:", f"  {experiment.format_command(whole)}"]
    return "\n".join(lines)


def recipe_alias(translation: Translation) -> str | None:
    """The recipe for this model and kind of training, if there is one for any number of GPUs."""
    peft = translation.choices.get("peft", "none")
    kind = "sft" if peft == "none" else "peft"
    name = f"{translation.choices.get('model', '')}_{kind}_config"
    return name if name in catalog.aliases() else None


def file_name(primus: Primus) -> str:
    """The experiment's name as a file's."""
    return re.sub(r"[^\w.-]+", "_", primus.path.stem).strip("._") or "primus"


def _drop_overridden(translation: Translation, overrides: list[str]) -> None:
    """Drop the groups that the overrides choose, and the values below the keys that they set."""
    for override in overrides:
        overridden = override.partition("=")[0]
        translation.choices.pop(overridden, None)
        for key in list(translation.values):
            if key == overridden or key.startswith(f"{overridden}."):
                del translation.values[key]


def _config_dir(arguments: list[str]) -> tuple[Path, list[str]]:
    """The configuration folder of --config-dir, else ./conf, and the arguments without it."""
    for index, item in enumerate(arguments):
        if item in ("--config-dir", "-cd"):
            if index + 1 == len(arguments):
                raise UserError("--config-dir: requires a folder")
            return Path(arguments[index + 1]), arguments[:index] + arguments[index + 2 :]
        if item.startswith("--config-dir="):
            return Path(item.partition("=")[2]), arguments[:index] + arguments[index + 1 :]
    return Path("conf"), arguments


if __name__ == "__main__":
    main()
