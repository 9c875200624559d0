"""The model card: README.md of an export, for people and for a hub."""

import re
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from posttrain.convert.training_metadata import FILE, are_facts, public_name
from posttrain.errors import UserError
from posttrain.models.headers import read_json, read_optional_json
from posttrain.models.hf import is_hub_id
from posttrain.models.hf_adapter import base_of, is_adapter
from posttrain.utils.atomic_files import write_json, write_text
from posttrain.utils.escape import escape_control

CARD = "README.md"
LOAD = {
    "peft": "from peft import AutoPeftModelForCausalLM as Model\nfrom transformers import AutoTokenizer",
    "transformers": "from transformers import AutoModelForCausalLM as Model, AutoTokenizer",
}
GENERATION = "generation_config.json"
# A text of names, numbers and punctuation that can't be markup; an address would become a link by itself.
HARMLESS = re.compile(r"(?!.*(://|www\.))[\w .,:;+=@%/()'-]*")
HUB_ID = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}")
LONGEST = 200  # characters of a text from a configuration


def write_card(directory: Path, name: str, facts: dict[str, Any] | None, license: str | None = None) -> None:
    """Write README.md, and the facts as training.json.

    Args:
        directory: of the export, with its verification.json where there is one.
        name: the directory's when it is published.
        facts: see posttrain.convert.training_metadata; None: nothing is known of a training.
        license: an identifier such as apache-2.0; None: the facts' own.
    """
    if facts is not None:
        facts = facts | {"license": license or facts.get("license")}
        write_json(directory / FILE, facts)
    facts = facts or {}
    license = license or facts.get("license")
    library = "transformers"
    base = facts.get("base")
    tags = ["posttrain", "megatron-bridge"]
    if facts:
        tags.append(str(facts.get("settings", {}).get("objective", "sft")).lower())
    if is_adapter(directory):
        library = "peft"
        base = base or base_of(directory)
        tags.append("lora")
    head = ModelCardData(
        license=" ".join((license or "unknown").split())[:LONGEST],
        base_model=base if base and is_hub_id(base) and HUB_ID.fullmatch(base) else None,
        datasets=_hub_datasets(facts) or None,
        library_name=library,
        pipeline_tag="text-generation",
        tags=tags,
    )
    text = describe(name, library, base, license, facts, verified(directory)) + stopping(directory, library)
    card = ModelCard(f"---\n{head.to_yaml()}\n---\n\n{text}")
    write_text(directory / CARD, str(card))


def _hub_datasets(facts: dict[str, Any]) -> list[str]:
    """Ids of the data sets of a hub that were trained on; a name may be hf://OWNER/NAME:SUBSET@REVISION."""
    datasets = []
    for name in facts.get("data", {}).get("names", []):
        hub_id = name.removeprefix("hf://").split("@")[0].split(":")[0]
        if name.startswith("hf://") and HUB_ID.fullmatch(hub_id):
            datasets.append(hub_id)
    return datasets


def describe(
    name: str, library: str, base: str | None, license: str | None, facts: dict[str, Any], checked: str
) -> str:
    """The text below the front matter, in Markdown."""
    parts = [f"# {plain(name)}", ""]
    if facts and base:
        parts.append(f"Trained from {code(public_name(base))}: {plain(facts['method'])}.")
    else:
        parts.append("Converted; nothing says how it was trained.")
    licence = plain(license) if license else "unknown; name it with trainer.license or convert.license"
    parts += ["", f"Licence: {licence}.", ""]
    if facts:
        parts += ["## Data", "", *_data(facts["data"]), "", "## Results", "", *_table(facts["results"]), ""]
        parts += ["## Settings", "", *_table(facts["settings"] | facts["software"]), ""]
    parts += ["## Check", "", checked, "", "## Use", "", "```python", LOAD[library], ""]
    parts += ['path = "..."  # this directory, or the id of its repository', "model = Model.from_pretrained(path)"]
    parts += ["tokenizer = AutoTokenizer.from_pretrained(path)", "```"]
    return "\n".join(parts) + "\n"


def stopping(directory: Path, library: str) -> str:
    """Where an adapter's answers end and how to say so, in Markdown: PEFT takes that from the base model alone."""
    if library != "peft" or not (directory / GENERATION).is_file():
        return ""
    ids = read_json(directory / GENERATION).get("eos_token_id")
    report = verification(directory) or {}
    tokens = ", ".join(code(token) for token in report.get("tokenizer", {}).get("end_tokens", ()))
    written = f" ({tokens})" if tokens else ""
    return (
        f"\nAn answer ends at one of the tokens {plain(str(ids))}{written}. The base model may not know that; say it "
        "before `model.generate`:\n\n```python\nfrom transformers import GenerationConfig\n\n"
        "model.generation_config = GenerationConfig.from_pretrained(path)\n```\n"
    )


def verified(directory: Path) -> str:
    """What verification.json says, in a sentence."""
    report = verification(directory)
    if report is None:
        return "The logits of these files were not compared with anything."
    logits = report["logits"]
    if not logits["checked"]:
        return f"The logits of these files were not compared with the trained model's: {logits['reason']}."
    return (
        f"The logits of these files, by {logits['arithmetic']} arithmetic of transformers, were compared with the "
        f"trained model's: the {logits['measure']} is {logits['difference']:.2g}, "
        f"at most {logits['tolerance']:.2g} was allowed."
    )


def verification(directory: Path) -> dict[str, Any] | None:
    """verification.json, or None."""
    return read_optional_json(directory / "verification.json") or None


def read_facts(directory: Path) -> dict[str, Any] | None:
    """training.json of an export; None where there is none, or one that isn't what `write_card` has written."""
    try:
        facts = read_optional_json(directory / FILE)
    except UserError:
        return None
    return facts if are_facts(facts) else None


def with_step(directory: Path) -> str:
    """`RUN/adapter (step 20 of 30, which has the lowest validation loss)`, as far as training.json says it."""
    results = (read_facts(directory) or {}).get("results", {})
    step, steps = results.get("exported_step"), results.get("steps")
    if not isinstance(step, int) or not isinstance(steps, int):
        return str(directory)
    if step == steps:
        return f"{directory} (step {step})"
    return f"{directory} (step {step} of {steps}, which has the lowest validation loss)"


def plain(text: str) -> str:
    """A text from a configuration or a file, within a line of Markdown: as it is, or as code if it could be markup."""
    line = " ".join(text.split())
    if len(line) <= LONGEST and HARMLESS.fullmatch(line):
        return line
    return code(line)


def code(text: str) -> str:
    """Such a text as code, in which Markdown sees no links, pictures nor HTML."""
    line = escape_control(" ".join(text.split()))[:LONGEST]
    return f"`{line.replace('`', chr(39)) or ' '}`"


def _data(data: dict[str, Any]) -> list[str]:
    names = ", ".join(code(name) for name in data["names"])
    lines = [f"- {names}, read as {plain(data['format'])}"]
    for key, digests in data.get("sha256", {}).items():
        lines.append(f"- SHA-256 of {plain(key)}: {', '.join(map(plain, digests))}")
    for split in ("train", "validation"):
        counts = [f"{value:,} {plain(key.replace('_', ' '))}" for key, value in data.get(split, {}).items()]
        if counts:
            lines.append(f"- {split}: {', '.join(counts)}")
    return lines


def _table(values: dict[str, Any]) -> list[str]:
    rows = ["| | |", "|---|---|"]
    for key, value in values.items():
        text = f"{value:.4g}" if isinstance(value, float) else plain(str(value))
        cells = [cell.replace("|", r"\|") for cell in (plain(key), text)]  # in a table it would end the cell
        rows.append(f"| {' | '.join(cells)} |")
    return rows
