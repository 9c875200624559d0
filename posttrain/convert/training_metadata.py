"""What is worth knowing about trained weights, kept beside them in training.json: base, data, settings, results."""

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from posttrain.models.hf import is_hub_id
from posttrain.utils.mappings import without_none

FILE = "training.json"
PACKAGES = ("posttrain", "megatron-bridge", "megatron-core", "torch", "transformers")
# Keys of the configuration that decide what is learnt.
SETTINGS = (
    "optimizer.optimizer",
    "optimizer.lr",
    "optimizer.min_lr",
    "optimizer.weight_decay",
    "scheduler.lr_decay_style",
    "trainer.global_batch_size",
    "trainer.seq_length",
    "data.train_on",
    "data.packing",
    "template.name",
    "precision.name",
    "seed",
)

# What facts are made of; the first three are always there.
TEXTS = ("base", "method", "license")
PARTS = ("data", "settings", "results", "software")

RESULTS = ("steps", "exported_step", "val_loss_before", "val_loss_after", "train_loss", "supervised_tokens")


def collect_facts(cfg: DictConfig, results: dict[str, Any], report: dict[str, Any] | None) -> dict[str, Any]:
    """The facts of a run, without the paths of this machine.

    Args:
        cfg: the frozen configuration.
        results: of RESULTS those that are known; what is None is left out.
        report: what `TrainingData.build` counted; None: it isn't known.
    """
    report = report or {}
    settings = {"objective": cfg.objective._target_.rpartition(".")[2]}
    for key in SETTINGS:
        settings[key] = OmegaConf.select(cfg, key)
    if report.get("row_unit") == "document":  # these are of conversations
        del settings["data.train_on"]
        del settings["template.name"]
    versions = {name: _version(name) for name in PACKAGES}
    return {
        "base": public_name(cfg.model.path),
        "method": describe_method(cfg.peft),
        "data": describe_data(cfg.data, report),
        "settings": without_none(settings),
        "results": without_none({key: results.get(key) for key in RESULTS}),
        "license": cfg.trainer.get("license"),
        "software": without_none(versions),
    }


def are_facts(facts: dict[str, Any]) -> bool:
    """Whether a JSON object has the form of what `collect_facts` returns: it may be from anybody's file."""
    base, method, license = map(facts.get, TEXTS)
    if not isinstance(base, str) or not isinstance(method, str) or not isinstance(license, str | None):
        return False
    for part in PARTS:
        if not isinstance(facts.get(part), dict):
            return False
    for part in PARTS[1:]:
        if not _are(list(facts[part].values()), str, int, float):
            return False
    data = facts["data"]
    digests = data.get("sha256", {})
    return (
        isinstance(data.get("format"), str)
        and _are(data.get("names"), str)
        and isinstance(digests, dict)
        and all(_are(values, str) for values in digests.values())
        and _are_counts(data.get("train", {}))
        and _are_counts(data.get("validation", {}))
    )


def _are(values: object, *kinds: type) -> bool:
    return isinstance(values, list) and all(isinstance(value, kinds) for value in values)


def _are_counts(part: object) -> bool:
    return isinstance(part, dict) and _are(list(part.values()), int)


def public_name(base: str) -> str:
    """A model's name without this machine's path.

    It is a hub id as it is, a directory's own name, or in a hub's cache (models--OWNER--NAME/snapshots/REVISION) the id
    of the repository.
    """
    if is_hub_id(base):
        return base
    directory = Path(base)
    if directory.parent.name == "snapshots" and directory.parent.parent.name.startswith("models--"):
        return directory.parent.parent.name.removeprefix("models--").replace("--", "/", 1)
    return directory.name


def describe_method(peft: DictConfig) -> str:
    """Which weights were trained, in words."""
    if not peft.get("_target_"):
        return "all weights"
    targets = peft.target_modules
    if not isinstance(targets, str):
        targets = ", ".join(targets)
    rank = str(peft.rank)
    if peft.get("alpha") is not None:
        rank += f", alpha {peft.alpha:g}"
    return f"{peft._target_.rpartition('.')[2]} of rank {rank} on {targets}"


def describe_data(node: DictConfig, report: dict[str, Any]) -> dict[str, Any]:
    """What was trained on: names, digests of the content, counts."""
    facts: dict[str, Any] = {"names": [_public_source(name) for name in source_names(node)]}
    facts["format"] = str(node.format.get("_target_", "")).rpartition(".")[2]
    if report.get("sha256"):
        facts["sha256"] = report["sha256"]
    for split in ("train", "validation"):
        counts = report.get(split)
        if counts:
            facts[split] = {key: counts[key] for key in ("conversations", "tokens", "supervised_tokens")}
    return facts


def source_names(node: DictConfig) -> list[str]:
    """What `data.path`, or `data.sources`, name."""
    paths = [node.get("path")]
    if paths == [None]:
        paths = [source.path for source in node.get("sources") or ()]
    names: list[str] = []
    for path in filter(None, paths):
        names += [path] if isinstance(path, str) else path
    return names


def _public_source(name: str) -> str:
    """A source without this machine's path."""
    return name if ":" in name else Path(name).name


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
