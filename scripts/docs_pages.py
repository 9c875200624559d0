"""Pages of the documentation that are made while it is built (a hook of mkdocs.yml).

One per config group from conf/, the fields of a config.json from the families' records, and the commands from their
modules. None of them is a file of the repository.
"""

import importlib
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from posttrain.cli import conf_options as options  # noqa: E402
from posttrain.cli import help_screen, subcommands  # noqa: E402
from posttrain.config import schema  # noqa: E402
from posttrain.models.families import families, field_rules  # noqa: E402

CONF = ROOT / "conf"
GROUPS = [*help_screen.groups(CONF), "hydra/launcher"]
# What the pages of docs/ link to -> the page that is generated from it; besides, conf/GROUP -> configuration/GROUP.md.
GENERATED_FROM = {
    "../README.md#commands": "commands.md",
    "../bench/README.md": "measured.md",
    "../conf/evaluate.yaml": "commands.md",
    "../posttrain/models/families": "config_fields.md",
}
DEPLOYED = {"Dockerfile": "docker", "deploy/trainjob.yaml": "yaml", "deploy/skypilot.yaml": "yaml"}  # file -> language
GENERATED_FROM |= {f"../{path}": f"deploy_files.md#{Path(path).stem.lower()}" for path in DEPLOYED}
LIMITS = {"ge": "at least", "gt": "greater than", "le": "at most", "lt": "less than"}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the generated pages, and any page that the navigation doesn't name, into the navigation."""
    named = str(config.nav)
    for item in config.nav:
        if "Configuration" in item:
            item["Configuration"] += [f"configuration/{_name(group)}.md" for group in GROUPS]
        if "Guides" in item:
            item["Guides"] += [
                page.name for page in sorted(Path(config.docs_dir).glob("*.md")) if page.name not in named
            ]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    pages = {f"configuration/{_name(group)}.md": group_page(group) for group in GROUPS}
    pages["configuration/run.md"] = run_page()
    pages["config_fields.md"] = fields_page()
    pages["commands.md"] = commands_page(Path(config.docs_dir))
    pages["deploy_files.md"] = deploy_page()
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Lead links to the generated pages.

    In the repository, where those are not, the links lead to what they are generated from.
    """
    if markdown.strip() == '--8<-- "bench/README.md"':  # here, since its links lead from another folder
        markdown = (ROOT / "bench" / "README.md").read_text().replace("](../docs/", "](")
    markdown = re.sub(r"\]\(\.\./conf/(\w+)\)", r"](configuration/\1.md)", markdown)
    for source, page in GENERATED_FROM.items():
        markdown = re.sub(rf"\]\({re.escape(source)}(?=[)#])", f"]({page}", markdown)
    return markdown


FIELDS = """# Fields of config.json

What a model's `config.json` may say, by family, from the families' records. Before anything is loaded every field is
**honoured** (●: what is computed is what `transformers` computes), known to be **without effect** on it (○), or
**refused** in one line with exit code 2: a value that is not listed, or a field that is not in this table. An unknown
field that is null, false, zero or empty says nothing and is let through. A family without a record is checked by
Megatron-Bridge alone; then `trainer.verify_base` compares logits before the first step.
"""


def fields_page() -> str:
    """Which fields of a config.json are honoured, without effect or refused, by family."""
    known = families()
    names = sorted({name for family in known for name in family.rules} - field_rules.COMMON.keys())
    shared = [name for name, rule in field_rules.COMMON.items() if rule.honoured]
    lines = [FIELDS, f"| field | must be | {' | '.join(family.model_type for family in known)} |"]
    lines.append("|---" * (2 + len(known)) + "|")
    for name in [*shared, *names]:
        found = [family.rules.get(name) for family in known]
        words = dict.fromkeys(rule.words for rule in found if rule is not None and rule.honoured)
        marks = " | ".join(" " if rule is None else "●" if rule.honoured else "○" for rule in found)
        lines.append(f"| `{name}` | {'; '.join(words)} | {marks} |")
    lines += ["", "## Rotary embeddings", "", "| kind | needs | may have |", "|---|---|---|"]
    for kind, parameters in field_rules.ROPE_KINDS.items():
        cells = (_listed_fields(parameters.required), _listed_fields(parameters.optional))
        lines.append(f"| `{kind}` | {cells[0]} | {cells[1]} |")
    without = _listed_fields({name: rule for name, rule in field_rules.COMMON.items() if not rule.honoured})
    return "\n".join([*lines, "", "## Without effect in every family", "", without, ""])


def _listed_fields(found: Mapping[str, field_rules.Rule]) -> str:
    return ", ".join(f"`{name}`" for name in found)


def deploy_page() -> str:
    """The files for containers and clusters."""
    lines = ["# Files for containers and clusters", ""]
    for path, language in DEPLOYED.items():
        lines += [f"## {path} {{ #{Path(path).stem.lower()} }}", "", f"```{language}"]
        lines += [*(ROOT / path).read_text().splitlines(), "```", ""]
    return "\n".join(lines)


def group_page(group: str) -> str:
    """Choices and options of one config group."""
    folder, prefix = CONF / group, group.replace("/", ".")
    choices = sorted(folder.glob("*.yaml"))
    inner = sorted(path for path in folder.rglob("*.yaml") if path.parent != folder)
    default = options.default_choice(CONF, group)
    found, others = {}, {}
    for one in options.of_group(CONF, group):
        mine = one.option.key == prefix or one.option.key.startswith(f"{prefix}.")
        place = found if mine else others
        place[one.option.key] = one.option
    lines = [f"# `{group}`", "", f"`{group}=NAME` on the command line chooses `conf/{group}/NAME.yaml`"]
    lines[-1] += f"; by default it is `{default}`." if default else "; by default it is none."
    if others:
        lines[-1] += f" Its files may also set {_listed(others)}: what you give for these wins."
    lines += ["", "| choice | |", "|---|---|"]
    lines += [f"| `{path.stem}` | {_text(options.header(path))} |" for path in choices]
    types = _types(group, choices)
    lines += ["", "## Options", ""]
    for key, option in found.items():
        lines += _section(option, types.get(key))
    lines += ["## Files", ""]
    for path in inner if group == "model" else [*inner, *choices]:
        lines += [f'??? note "conf/{path.relative_to(CONF)}"', "    ```yaml"]
        lines += [f"    {line}" for line in path.read_text().splitlines()] + ["    ```", ""]
    return "\n".join(lines)


def run_page() -> str:
    """What conf/config.yaml says itself."""
    lines = ["# Seed, run, launch, sweep", "", _text(options.header(CONF / "config.yaml")), ""]
    types = _config_types(schema.Config)
    for option in options.read(CONF / "config.yaml"):
        lines += _section(option, types.get(option.key))
    return "\n".join(lines)


def commands_page(docs: Path) -> str:
    """Every command with what its module says, and its own options."""
    lines = ["# Commands", "", "Training is `python -m posttrain`. All others are `python -m posttrain.COMMAND`, or"]
    lines += ["`posttrain COMMAND`, which has `train` and `chat` (`generate`) as well; those"]
    lines += ["that look at data or a model take the overrides of training, and mean the same by them.", ""]
    for name, summary in subcommands.summaries(ROOT / "posttrain"):
        module = importlib.import_module(f"posttrain.{name}.__main__" if (ROOT / "posttrain" / name).is_dir()
                                         else f"posttrain.{name}")  # fmt: skip
        lines += [f"## `{name}`: {_text(summary)}", "", _prose(module.__doc__), ""]
        if (docs / f"{name}.md").is_file():
            lines += [f"More: [{name}]({name}.md)", ""]
        if (CONF / f"{name}.yaml").is_file():
            types = _command_types(module)
            for option in options.read(CONF / f"{name}.yaml"):
                if not option.key.startswith("hydra."):
                    lines += _section(option, types.get(option.key))
        elif "argparse" in Path(module.__file__).read_text():
            lines += ["```text", _usage(name), "```", ""]
    script = ROOT / "scripts" / "posttrain.sh"
    if script.is_file():
        said = re.findall(r"^# ?(.*)$", script.read_text().split("\n\n")[0], re.MULTILINE)
        lines += ["## `scripts/posttrain.sh`", "", "```text", *(line for line in said if "!/" not in line), "```"]
    return "\n".join(lines)


def _section(option: options.Option, kind: str | None) -> list[str]:
    """One option: a heading that can be linked to, its type and default, its comment."""
    facts = [kind] if kind else []
    if option.default:
        facts.append(f"default `{option.default.replace('`', '')}`")
    return [f"### `{option.key}` {{ #{option.key} }}", "", ", ".join(facts), "", _text(option.comment), ""]


def _types(group: str, choices: list[Path]) -> dict[str, str]:
    """Key -> type and range, from the group's schema, else from the classes that its files name."""
    found = {field.name: field.type for field in fields(schema.Config)} | {"hydra/launcher": schema.SlurmSchema}
    prefix = group.replace("/", ".")
    types = {f"{prefix}.{name}": text for name, text in _fields(found.get(group)).items()}
    if types:
        return types
    for path in [*choices, *(CONF / group).rglob("*.yaml")]:
        for target in re.findall(r"^ *_target_: (posttrain\S+)$", path.read_text(), re.MULTILINE):
            inside = ".format" if group == "data" and target.startswith("posttrain.data.formats.") else ""
            module, _, name = target.rpartition(".")
            for key, text in _fields(getattr(importlib.import_module(module), name, None)).items():
                types.setdefault(f"{prefix}{inside}.{key}", text)
    return types


def _command_types(module: ModuleType) -> dict[str, str]:
    """Key -> type and range of a command's own options, from the dataclass that it composes."""
    settings = f"{module.__package__}.settings"
    owner = importlib.import_module(settings) if importlib.util.find_spec(settings) else module
    configs = [item for name, item in vars(owner).items() if name.endswith("Config") and is_dataclass(item)]
    return {key: text for config in configs for key, text in _config_types(config).items()}


def _config_types(config: type) -> dict[str, str]:
    """Key -> type and range of a whole configuration."""
    inner = {f"{group.name}.{name}": text for group in fields(config) for name, text in _fields(group.type).items()}
    return inner | _fields(config)


def _fields(owner: Any) -> dict[str, str]:
    """Field -> type and range in words, of a dataclass."""
    found = {}
    for field in getattr(owner, "__dataclass_fields__", {}).values():
        kind = field.type if isinstance(field.type, str) else getattr(field.type, "__name__", str(field.type))
        kind = str(field.type) if "|" in str(field.type) or "[" in str(field.type) else kind
        words = [f"`{kind.replace('typing.', '')}`"] if kind != "Any" else []
        words += [f"{word} {field.metadata[name]}" for name, word in LIMITS.items() if name in field.metadata]
        if "choices" in field.metadata:
            words.append("one of " + ", ".join(f"`{choice}`" for choice in field.metadata["choices"]))
        found[field.name] = ", ".join(words)
    return found


def _usage(command: str) -> str:
    """What `--help` prints."""
    done = subprocess.run(
        [sys.executable, "-m", f"posttrain.{command}", "--help"], capture_output=True, text=True, cwd=ROOT, check=True,
        env={**os.environ, "COLUMNS": "90", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    return done.stdout.strip()


def _prose(docstring: str) -> str:
    """A docstring as Markdown: its indented lines are code already."""
    return "\n".join(line if line.startswith("    ") else _text(line) for line in docstring.strip().splitlines())


def _text(comment: str) -> str:
    """Plain text as Markdown: what isn't between backticks means nothing special."""
    parts = comment.split("`")
    return "`".join(part if index % 2 else _plain(part) for index, part in enumerate(parts))


def _plain(text: str) -> str:
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "&#124;")
    return re.sub(r"([*_\[\]\\])", r"\\\1", text)


def _listed(keys: dict[str, Any]) -> str:
    return ", ".join(f"`{key}`" for key in keys)


def _name(group: str) -> str:
    return group.rpartition("/")[2]
