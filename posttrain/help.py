"""The screen of `python -m posttrain --help`: every word and its choices, read from conf/."""

import textwrap
from pathlib import Path

HEAD = """\
posttrain: fine-tune language models on Megatron-Bridge, from a laptop CPU to a Slurm cluster.

  python -m posttrain                                    the demo: a real small model, on a CPU or GPU
  python -m posttrain model=llama3_8b data=alpaca data.path=my.json template=chatml
  python -m posttrain model=hf model.path=DIR peft=none optimizer.lr=1e-5 trainer.epochs=2
  python -m posttrain --multirun optimizer.lr=1e-4,2e-4 peft.rank=8,16
  python -m posttrain recipe=llama3_8b_peft_config data=...   from a recipe of Megatron-Bridge; recipe=list names them

Words (word=choice; change a value with word.key=value):"""
FOOT = """\
Every key and value:     python -m posttrain --cfg job     What each means: the YAML files in conf/
Other commands:          python -m posttrain.COMMAND with {commands}
Shell completion:        eval "$(python -m posttrain -sc install=bash)"
"""
WORDS = "model peft data template parallelism optimizer scheduler trainer precision checkpoint logger experiment"


def screen(conf: Path, package: Path) -> str:
    """The text, for a terminal of 110 columns.

    Args:
        conf: the configuration folder.
        package: this package's folder, whose modules with a `main` are commands.
    """
    lines = [HEAD]
    for word in WORDS.split():
        names = sorted(path.stem for path in (conf / word).glob("*.yaml"))
        text = " ".join(_by_family(names) if word == "model" else names)
        indent = f"  {word:<13}"
        lines += textwrap.wrap(text, 110, initial_indent=indent, subsequent_indent=" " * len(indent),
                               break_on_hyphens=False, break_long_words=False)  # fmt: skip
    commands = sorted(
        path.parent.name if path.name == "__main__.py" else path.stem
        for path in [*package.glob("*.py"), *package.glob("*/__main__.py")]
        if path.name != "__main__.py" or path.parent != package
        if path.stem != "worker" and '\nif __name__ == "__main__":' in path.read_text()
    )
    return "\n".join([*lines, "", FOOT.format(commands=", ".join(commands))])


def _by_family(names: list[str]) -> list[str]:
    """`llama3_8b llama3_70b` as `llama3_{8b,70b}`: a hundred models on a few lines."""
    families: dict[str, list[str]] = {}
    for name in names:
        family, _, size = name.partition("_")
        families.setdefault(family, []).append(size)
    return [
        f"{family}_{{{','.join(sizes)}}}" if len(sizes) > 1 else "_".join(filter(None, [family, *sizes]))
        for family, sizes in families.items()
    ]
