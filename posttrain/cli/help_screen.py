"""The screen of `python -m posttrain --help`: every group with its choices, and every command."""

import re
import textwrap
from collections.abc import Collection
from pathlib import Path

from posttrain.cli import conf_options, subcommands

COLUMNS = 100
HEAD = """\
posttrain: fine-tune language models on Megatron-Bridge, from a laptop CPU to a Slurm cluster.

  python -m posttrain                                             the demo, on a CPU or GPU
  python -m posttrain model=llama3_8b data.path=my.json hydra.run.dir=outputs/mine   your data
  python -m posttrain model=hf model.path=DIR peft=none optimizer.lr=1e-5            all weights
  python -m posttrain my.yaml                                     a file: model: llama3_8b, ...
  python -m posttrain --resume outputs/mine                       stopped? at its last checkpoint
  python -m posttrain --rerun outputs/mine seed=2                 its overrides in a new directory
  python -m posttrain --multirun optimizer.lr=1e-4,2e-4 peft.rank=8,16               a grid
  python -m posttrain launch.submit=true hydra.launcher.partition=gpu hydra.launcher.time=8:00:00
    as a Slurm job (keys: posttrain options hydra/launcher); its script: hydra.launcher.dry_run=true

Overrides: group=choice selects conf/group/choice.yaml, group.key=value changes one value in it.
A list: 'logger=[csv,wandb]'. Some rows: 'data.where=lang == "en"'.
A group's keys with default and meaning: python -m posttrain options trainer (or data=custom)
(A * after a model: there is NAME_instruct, NAME_chat or NAME_it as well.)"""
COMMANDS = "Commands: posttrain COMMAND, or python -m posttrain.COMMAND, each with --help"
SCRIPT = "A menu, and a line for cluster scripts:   scripts/posttrain.sh"
FOOT = """\
Completion: eval "$(posttrain -sc install=bash)". Every key and value: python -m posttrain --cfg job"""
REMARKS = {"metric": "  (of evaluate)"}  # on groups that training does not use
# In the order of a command line; a group that isn't listed comes after them.
ORDER = (
    "model",
    "peft",
    "data",
    "template",
    "parallelism",
    "optimizer",
    "scheduler",
    "trainer",
    "precision",
    "checkpoint",
    "logger",
    "experiment",
)


def render(conf: Path, package: Path) -> str:
    """Return the text, for a terminal of 100 columns.

    Args:
        conf: the configuration folder.
        package: this package's folder, whose modules with a `main` are commands.
    """
    lines = [HEAD]
    for group in groups(conf):
        names = option_names(conf / group)
        if group == "model":
            names = _by_family(names)
        lines += _wrap(group, " ".join(names) + REMARKS.get(group, ""))
    lines += ["", COMMANDS]
    for name, summary in [*subcommands.ALIASES.items(), *subcommands.summaries(package)]:
        lines += _wrap(name, summary)
    lines.append("")
    if (package.parent / "scripts" / "posttrain.sh").is_file():  # not in a wheel
        lines.append(SCRIPT)
    lines.append(FOOT)
    return "\n".join(lines)


def option_names(group: Path) -> list[str]:
    """The choices of a config group."""
    return sorted(path.stem for path in group.glob("*.yaml"))


def groups(conf: Path) -> list[str]:
    """The config groups, those of training first."""
    names = []
    for folder in sorted(conf.iterdir()):
        if any(folder.glob("*.yaml")) and folder.name != "hydra":
            names.append(folder.name)
    order = {name: position for position, name in enumerate(ORDER)}
    return sorted(names, key=lambda name: order.get(name, len(ORDER)))


def options(path: Path, keys: Collection[str] | None = None) -> str:
    """The options of a command's own with their defaults and comments.

    Args:
        path: its file in conf/.
        keys: those to show; None: all.
    """
    lines: list[str] = []
    for option in conf_options.read(path):
        if option.key.startswith("hydra.") or (keys is not None and option.key not in keys):
            continue
        lines += option_lines(option)
    return "\n".join(lines)


def option_lines(option: conf_options.Option, only_in: str = "") -> list[str]:
    """A key with its default, and below it its comment.

    Args:
        option: the key.
        only_in: the choices that have it, if not all have; put behind it.
    """
    line = f"  {option.key}={option.default}" if option.default else f"  {option.key}"
    if only_in:
        line += f"   ({only_in})"
    indent = " " * 6
    return [line, *textwrap.wrap(option.comment, COLUMNS, initial_indent=indent, subsequent_indent=indent)]


def _wrap(name: str, text: str) -> list[str]:
    """The lines of one group or command, with the texts below each other."""
    indent = f"  {name:<12} "
    return textwrap.wrap(
        text,
        COLUMNS,
        initial_indent=indent,
        subsequent_indent=" " * len(indent),
        break_on_hyphens=False,
        break_long_words=False,
    )


def _by_family(names: list[str]) -> list[str]:
    """`llama3_8b llama3_70b` as `llama3_{8b,70b}`: a hundred models on a few lines.

    A `*` stands for an `_instruct`, `_chat` or `_it` beside its base.
    """
    bases = {name: re.sub("_(instruct|chat|it)$", "", name) for name in names}
    with_tuned = {base for name, base in bases.items() if base != name}
    sizes_of: dict[str, list[str]] = {}
    for name, base in bases.items():
        if base != name and base in names:
            continue
        family, _, size = name.partition("_")
        if name in with_tuned:
            size += "*"
        sizes_of.setdefault(family, []).append(size)
    shortened = []
    for family, sizes in sizes_of.items():
        if len(sizes) > 1:
            shortened.append(f"{family}_{{{','.join(sizes)}}}")
        elif sizes[0]:
            shortened.append(f"{family}_{sizes[0]}")
        else:
            shortened.append(family)
    return shortened
