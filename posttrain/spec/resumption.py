"""Whether a run may resume: known before its directory is touched, so that a refused one stays as it was."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from posttrain.checkpoint import fingerprints, progress, resume
from posttrain.config import frozen
from posttrain.spec import inputs
from posttrain.spec.epochs import Epoch, planned_steps

# Keys that name files -> the digests of what is in them (posttrain/spec/inputs.py).
FILES = {
    "data.path": ("data",),
    "data.sources": ("data",),
    "data.validation_path": ("validation",),
    "model.path": ("weights", "template"),
    "model.tokenizer": ("template",),
    "template.file": ("template",),
}
NOTHING = hashlib.sha256(json.dumps([]).encode()).hexdigest()  # the digest of files that are not on this machine


def check(cfg: DictConfig, run_dir: Path) -> None:
    """Refuse to resume where that can't be intended. Files may have been moved, if their content is the same.

    Args:
        cfg: the checked configuration.
        run_dir: the run's; there may be none yet.

    Raises:
        UserError: run.resume=never and there is a checkpoint, the configuration or the content of a file differs from
            the checkpoint's, or fewer steps are asked for than it has.
    """
    checkpoint = resume.find_allowed(cfg, run_dir)
    if checkpoint is None:
        return
    before = frozen.read(checkpoint, resume.CONFIG)
    contents = compare_contents(checkpoint, before, cfg)
    kept = {}
    for key, names in FILES.items():
        if all(name in contents for name in names) and _files_alone_differ(key, before, cfg):
            kept[key] = all(contents[name] for name in names)
    resume.check_configuration(checkpoint, before, cfg, kept)
    fingerprints.refuse(_changed(contents, cfg), checkpoint)
    rows = progress.rows(checkpoint)
    epoch = Epoch(rows, cfg.trainer.global_batch_size) if rows else None
    steps = planned_steps(cfg.trainer.max_steps, cfg.trainer.epochs, epoch)
    if steps is not None:
        resume.check_steps(checkpoint, steps, cfg)


def compare_contents(checkpoint: Path, before: DictConfig, cfg: DictConfig) -> dict[str, bool]:
    """Whether the files that `cfg` names have the content of those that a checkpoint's run read, by digest.

    What can't be read, what lies elsewhere (a hub), and what an older checkpoint doesn't say is left out.

    Args:
        checkpoint: to resume from.
        before: its configuration.
        cfg: of the run that is to resume.
    """
    saved = progress.digests(checkpoint)
    if not saved:
        return {}
    now = inputs.digests(cfg)
    contents = {}
    for name, digest in now.items():
        if name in saved and digest != NOTHING:
            contents[name] = digest == saved[name]
    batches = OmegaConf.select(before, "trainer.validation_batches")
    if batches != cfg.trainer.validation_batches:  # they may change, and are in the digest
        contents.pop("validation", None)
    return contents


def _files_alone_differ(key: str, before: DictConfig, cfg: DictConfig) -> bool:
    """Whether what a key of files says besides their names is the same; of several sources their weights, for one."""
    if key != "data.sources":
        return True
    old = OmegaConf.select(before, key) or ()
    new = cfg.data.sources or ()
    return list(map(_without_path, old)) == list(map(_without_path, new))


def _without_path(source: Mapping[str, object]) -> dict[str, object]:
    return {key: value for key, value in source.items() if key != "path"}


def _changed(contents: Mapping[str, bool], cfg: DictConfig) -> list[str]:
    """What has changed of what a resumed run must find as it was, in words; the ranks look at the same once more."""
    changed = []
    if contents.get("data") is False:
        changed.append(fingerprints.INPUTS["data"])
    if cfg.data.get("validation_path") is not None and contents.get("validation") is False:
        changed.append(fingerprints.INPUTS["validation"])
    if cfg.peft._target_ and contents.get("weights") is False:
        changed.append("config.json or the weights of model.path")
    return changed
