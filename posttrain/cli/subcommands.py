"""The commands: `posttrain preview ...` is `python -m posttrain.preview ...`, and without a name it trains.

`posttrain ...` is `python -m posttrain ...` too, whose first argument may name a command. Nothing heavy is imported
here: the command that is named imports what it needs itself.
"""

import ast
import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

from posttrain.utils import stop, working
from posttrain.utils.suggest import did_you_mean

PACKAGE = Path(__file__).resolve().parents[1]
TRAIN = "train"
ALIASES = {TRAIN: "fine-tune, as without a command", "chat": "generate, without a question"}
MODULES = {TRAIN: "posttrain", "chat": "posttrain.generate"}  # of these
WORD = re.compile(r"[A-Za-z][\w-]*")  # what is neither an option, an override, nor a file
ENTRY = '\nif __name__ == "__main__":\n    main()'


def main() -> None:
    """Entry point of the `posttrain` script."""
    runpy.run_module("posttrain", run_name="__main__", alter_sys=True)


def run_named() -> None:
    """Run the command that the first argument names, and exit with it; return where that is training."""
    if len(sys.argv) < 2 or not WORD.fullmatch(sys.argv[1]):
        return
    name = sys.argv.pop(1)
    if name == TRAIN:
        return
    names = sorted([*ALIASES, *files(PACKAGE)])
    if name not in names:
        nearest = did_you_mean(name, names) or "."
        stop.fail(f"{name}: no such command; there are {', '.join(names)}{nearest} Keys: posttrain options GROUP")
    working.begin("starting")
    runpy.run_module(module_of(name), run_name="__main__", alter_sys=True)
    raise SystemExit


def module_of(name: str) -> str:
    """The module of a command, as `python -m` takes it."""
    return MODULES.get(name, f"posttrain.{name}")


def files(package: Path) -> dict[str, Path]:
    """Command -> the file that has its `main`.

    Args:
        package: this package's folder.
    """
    candidates = {path.parent.name: path for path in package.glob("*/__main__.py")}
    candidates |= {path.stem: path for path in package.glob("*.py") if path.stem != "__main__"}
    return {name: path for name, path in sorted(candidates.items()) if ENTRY in path.read_text(encoding="utf-8")}


def summaries(package: Path) -> Iterator[tuple[str, str]]:
    """(command, what it does) of each."""
    for name, path in files(package).items():
        source = path.read_text(encoding="utf-8")
        yield name, summarize(ast.get_docstring(ast.parse(source)) or "")


def summarize(docstring: str) -> str:
    """Return a docstring's first sentence without the command line that it quotes."""
    line = " ".join(docstring.split("\n\n")[0].split())
    line = re.sub(r"^`python -m [^`]*`[^:]*: ", "", line)
    line = re.split(r"[:,]? `python -m |\. |; ", line)[0].rstrip(".:")
    starts_with_name = not (line[1:2].islower() or line[1:2] == " ")  # an abbreviation, say
    if starts_with_name:
        return line
    return line[:1].lower() + line[1:]
