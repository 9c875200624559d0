"""Take over a Primus configuration: `python -m posttrain.primus FILE.yaml [WORDS]`.

    python -m posttrain.primus qwen3_lora.yaml                       writes ./conf/experiment/qwen3_lora.yaml
    python -m posttrain.primus qwen3_lora.yaml --config-dir mine     writes mine/experiment/qwen3_lora.yaml
    python -m posttrain.primus sft.yaml out=run.yaml model=llama3_8b data=alpaca data.path=my.json

FILE has framework megatron_bridge, in either form: sections (model, training, lora, data, ...) or
modules.post_trainer.overrides. ${VARIABLE:default} is the environment's value, else the default. The command prints
what has no counterpart, and the command lines that run the result. WORDS are for what the file does not say, or for
another choice; they are put on the command line, not into the experiment. overwrite=true replaces a file.
"""

import re
import sys
from pathlib import Path

from posttrain import check, launch
from posttrain.compose import CONF_DIR, compose, fail
from posttrain.errors import UserError, of_place
from posttrain.files import write_text
from posttrain.primus import experiment
from posttrain.primus.read import Primus, read
from posttrain.primus.translate import Translation, translate
from posttrain.recipes import names
from posttrain.words import word


def main() -> None:
    """Entry point; exits with 2 after a mistake of the user's."""
    arguments = sys.argv[1:]
    if not arguments or {"-h", "--help"} & set(arguments):
        print(__doc__.strip())
        raise SystemExit(0 if arguments else 2)
    try:
        print(take_over(arguments))
    except UserError as error:
        fail(str(error))
    except OSError as error:
        if (place := of_place(error)) is None:
            raise
        fail(place)


def take_over(arguments: list[str]) -> str:
    """Read, translate, write and check.

    Args:
        arguments: of the command line.

    Returns:
        What to tell about it.

    Raises:
        UserError: the file can't be taken over, or the words are wrong.
    """
    folder, arguments = _config_dir(arguments)
    files = [item for item in arguments if "=" not in item]
    if len(files) != 1:
        raise UserError(f"one Primus file, please; found: {' '.join(files) or 'none'}")
    given = dict(item.split("=", 1) for item in arguments if "=" in item)
    options = {key: given[key] for key in ("out", "overwrite") if key in given}
    words = [item for item in arguments if "=" in item and item.partition("=")[0] not in options]
    primus = read(Path(files[0]).expanduser())
    model = next((item for item in words if item.startswith("model=")), None)
    done = translate(primus, model)
    _give_way(done, words)

    out = Path(options["out"]) if "out" in options else folder / "experiment" / f"{file_name(primus)}.yaml"
    if out.exists() and options.get("overwrite") != "true":
        raise UserError(f"{out}: is there already; add overwrite=true, or out=FILE")
    composed = [*experiment.words(done), *words]
    cfg = compose(composed)  # before anything is written
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, experiment.text(primus, done))
    try:
        check.check(cfg, launch.visible_gpus())
        verdict = "checked: it composes and passes every check on this machine"
    except UserError as error:
        verdict = f"it composes; before it can run on this machine: {error}"
    return report(primus, done, out, words, verdict)


def report(primus: Primus, done: Translation, out: Path, words: list[str], verdict: str) -> str:
    """What was written, what was not taken over, and how to run it."""
    place = [word("hydra.run.dir", done.run_dir)] if done.run_dir else []
    lines = [f"written: {out}", verdict]
    if done.left_out:
        lines += ["not taken over:", *(f"  {line}" for line in done.left_out)]
    if hint := recipe(done):
        lines.append(
            f"what the file leaves to Megatron-Bridge's recipe is this project's default; or add recipe={hint}"
        )
    if out.parent.name == "experiment":
        own = [] if out.parent.parent.resolve() == CONF_DIR else ["--config-dir", str(out.parent.parent)]
        lines += ["run it:", f"  {experiment.command(*own, word('experiment', out.stem), *words, *place)}"]
    else:
        lines.append("to run it, put the file into a folder named experiment and name the folder above: --config-dir")
    return "\n".join([*lines, "the same without the file:",
                      f"  {experiment.command(*experiment.words(done), *words, *place)}"])  # fmt: skip


def recipe(done: Translation) -> str | None:
    """The recipe for this model and kind of training, if there is one for a single choice of GPUs."""
    kind = "sft" if done.choices.get("peft", "none") == "none" else "peft"
    name = f"{done.choices.get('model', '')}_{kind}_config"
    return name if name in names.aliases() else None


def file_name(primus: Primus) -> str:
    """The experiment's name as a file's."""
    return re.sub(r"[^\w.-]+", "_", primus.path.stem).strip("._") or "primus"


def _give_way(done: Translation, words: list[str]) -> None:
    """Drop what the words choose themselves: the file's choice of the group, and its values."""
    for group in {item.partition("=")[0] for item in words}:
        done.choices.pop(group, None)
        for key in [key for key in done.values if key == group or key.startswith(f"{group}.")]:
            del done.values[key]


def _config_dir(arguments: list[str]) -> tuple[Path, list[str]]:
    """The configuration folder of --config-dir, else ./conf, and the arguments without it."""
    for index, item in enumerate(arguments):
        if item in ("--config-dir", "-cd"):
            if index + 1 == len(arguments):
                raise UserError("--config-dir: name a folder")
            return Path(arguments[index + 1]), arguments[:index] + arguments[index + 2 :]
        if item.startswith("--config-dir="):
            return Path(item.partition("=")[2]), arguments[:index] + arguments[index + 1 :]
    return Path("conf"), arguments


if __name__ == "__main__":
    main()
