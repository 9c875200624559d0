"""What is worth knowing about trained weights, kept beside them in training.json: base, data, settings, results."""

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

FILE = "training.json"
PACKAGES = ("posttrain", "megatron-bridge", "megatron-core", "torch", "transformers")
# Keys of the configuration that decide what is learnt.
SETTINGS = (
    "optimizer.optimizer", "optimizer.lr", "optimizer.min_lr", "optimizer.weight_decay", "scheduler.lr_decay_style",
    "trainer.global_batch_size", "trainer.seq_length", "data.train_on", "data.packing", "template.name",
    "precision.name", "seed",
)  # fmt: skip

RESULTS = ("steps", "val_loss_before", "val_loss_after", "train_loss", "supervised_tokens")


def facts(cfg: DictConfig, results: dict[str, Any], report: dict[str, Any] | None) -> dict[str, Any]:
    """The facts of a run, without the paths of this machine.

    Args:
        cfg: the frozen configuration.
        results: of RESULTS those that are known; what is None is left out.
        report: what `TrainingData.build` counted; None: it isn't known.
    """
    base = cfg.model.path
    return {
        "base": base if is_hub_id(base) else public_name(Path(base)),
        "method": method(cfg.peft),
        "data": data(cfg.data, report or {}),
        "settings": {key: value for key in SETTINGS if (value := OmegaConf.select(cfg, key)) is not None},
        "results": {key: results[key] for key in RESULTS if results.get(key) is not None},
        "license": cfg.trainer.get("license"),
        "software": {name: found for name in PACKAGES if (found := _version(name))},
    }


def public_name(directory: Path) -> str:
    """A directory's name; in a hub's cache the id of the repository: models--OWNER--NAME/snapshots/REVISION."""
    if directory.parent.name == "snapshots" and directory.parent.parent.name.startswith("models--"):
        return directory.parent.parent.name.removeprefix("models--").replace("--", "/", 1)
    return directory.name


def is_hub_id(base: str) -> bool:
    """Whether a model's path is a hub's `owner/name`, not a directory."""
    return base.count("/") == 1 and not base.startswith((".", "/", "~")) and not Path(base).is_dir()


def method(peft: Any) -> str:
    """Which weights were trained, in words."""
    if not peft.get("_target_"):
        return "all weights"
    targets = peft.target_modules
    targets = targets if isinstance(targets, str) else ", ".join(targets)
    alpha = f", alpha {peft.alpha:g}" if peft.get("alpha") is not None else ""
    return f"{peft._target_.rpartition('.')[2]} of rank {peft.rank}{alpha} on {targets}"


def data(node: Any, report: dict[str, Any]) -> dict[str, Any]:
    """What was trained on: names, digests of the content, counts."""
    sources = [node.path] if node.get("path") is not None else [source.path for source in node.get("sources") or ()]
    names = [name for source in sources for name in ([source] if isinstance(source, str) else source)]
    found = {"names": [name if "://" in name or ":" in name else Path(name).name for name in names]}
    found["format"] = str(node.format.get("_target_", "")).rpartition(".")[2]
    if report.get("sha256"):
        found["sha256"] = report["sha256"]
    for split in ("train", "validation"):
        if part := report.get(split):
            found[split] = {key: part[key] for key in ("conversations", "tokens", "supervised_tokens")}
    return found


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
