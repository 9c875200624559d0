"""The screen of `python -m posttrain --help`: every word, its choices and every command, read from conf/ and here."""

import ast
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

COLUMNS = 100
HEAD = """\
posttrain: fine-tune language models on Megatron-Bridge, from a laptop CPU to a Slurm cluster.

  python -m posttrain                           the demo: a real small model, on a CPU or GPU
  python -m posttrain model=llama3_8b peft=lora data=alpaca data.path=my.json template=chatml
  python -m posttrain model=hf model.path=DIR peft=none optimizer.lr=1e-5 trainer.epochs=2
  python -m posttrain --multirun optimizer.lr=1e-4,2e-4 peft.rank=8,16
  python -m posttrain recipe=llama3_8b_peft_config data=...   names of recipes: recipe=list

Words: word=choice picks conf/word/choice.yaml, word.key=value changes one value in it.
(A * after a model: there is NAME_instruct, NAME_chat or NAME_it as well.)"""
COMMANDS = "Commands: python -m posttrain.COMMAND, each with --help"
SCRIPT = "A menu, and a line for cluster scripts:   scripts/posttrain.sh"
FOOT = """\
Every key and value:                      python -m posttrain --cfg job
What each means:                          comments in conf/, the same as pages: make docs
Completion for the `posttrain` command:   eval "$(posttrain -sc install=bash)\""""
# Words of training first, in the order of a command line; a group that isn't here comes after them.
OWN = {"metric": "  (of evaluate)"}  # groups that training has no use for
ORDER = "model peft data template parallelism optimizer scheduler trainer precision checkpoint logger experiment"


def screen(conf: Path, package: Path) -> str:
    """The text, for a terminal of 100 columns.

    Args:
        conf: the configuration folder.
        package: this package's folder, whose modules with a `main` are commands.
    """
    lines = [HEAD]
    for group in groups(conf):
        names = sorted(path.stem for path in (conf / group).glob("*.yaml"))
        lines += _row(group, " ".join(_by_family(names) if group == "model" else names) + OWN.get(group, ""))
    lines += ["", COMMANDS]
    for name, summary in commands(package):
        lines += _row(name, summary)
    script = [SCRIPT] if (package.parent / "scripts" / "posttrain.sh").is_file() else []  # not in a wheel
    return "\n".join([*lines, "", *script, FOOT])


def groups(conf: Path) -> list[str]:
    """The config groups, those of training first."""
    found = sorted(path.name for path in conf.iterdir() if any(path.glob("*.yaml")) and path.name != "hydra")
    order = ORDER.split()
    return sorted(found, key=lambda name: order.index(name) if name in order else len(order))


def commands(package: Path) -> Iterator[tuple[str, str]]:
    """(name, what it is for) of each module that is a command, from its docstring's first line."""
    found = {path.parent.name: path for path in package.glob("*/__main__.py")}
    found |= {path.stem: path for path in package.glob("*.py") if path.stem not in ("__main__", "worker")}
    for name, path in sorted(found.items()):
        source = path.read_text(encoding="utf-8")
        if '\nif __name__ == "__main__":' in source:
            yield name, summary(ast.get_docstring(ast.parse(source)) or "")


def summary(docstring: str) -> str:
    """A docstring's first sentence without the command line that it quotes."""
    line = " ".join(docstring.split("\n\n")[0].split())
    line = re.sub(r"^`python -m [^`]*`[^:]*: ", "", line)
    line = re.split(r"[:,]? `python -m |\. |; ", line)[0].rstrip(".:")
    return line[:1].lower() + line[1:] if line[1:2].islower() or line[1:2] == " " else line


def _row(name: str, text: str) -> list[str]:
    indent = f"  {name:<12} "
    return textwrap.wrap(text, COLUMNS, initial_indent=indent, subsequent_indent=" " * len(indent),
                         break_on_hyphens=False, break_long_words=False)  # fmt: skip


def _by_family(names: list[str]) -> list[str]:
    """`llama3_8b llama3_70b` as `llama3_{8b,70b}`: a hundred models on a few lines.

    A `*` stands for an `_instruct`, `_chat` or `_it` beside its base.
    """
    families: dict[str, list[str]] = {}
    tuned = {name: re.sub("_(instruct|chat|it)$", "", name) for name in names}
    starred = {base for name, base in tuned.items() if base != name}
    for name in names:
        if tuned[name] == name or tuned[name] not in names:
            family, _, size = name.partition("_")
            families.setdefault(family, []).append(size + "*" * (name in starred))
    return [
        f"{family}_{{{','.join(sizes)}}}" if len(sizes) > 1 else "_".join(filter(None, [family, *sizes]))
        for family, sizes in families.items()
    ]
