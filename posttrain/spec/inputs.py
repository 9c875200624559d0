"""What a run reads besides its configuration, as digests that are known before it starts.

They belong to a trial's identity: losses on other rows can't be compared, and what was trained on a file that has been
replaced since is another trial. Of what lies elsewhere (a hub, the demo) the name alone is known.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from omegaconf import DictConfig

from posttrain.checkpoint import fingerprints
from posttrain.config.instantiate import built
from posttrain.data import fingerprint, sources
from posttrain.data.training_data import TrainingData
from posttrain.errors import UserError
from posttrain.spec.first_rows import ELSEWHERE
from posttrain.utils.cache import cache_root
from posttrain.utils.user_paths import expand_home

FILE = "inputs.json"  # in a run directory
# Files of a tokenizer's folder that decide the text of a row and its tokens.
TOKENIZER = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja")


def digests(cfg: DictConfig) -> dict[str, str]:
    """Digests by what they are of: `data`, `validation`, `template`, `weights`.

    What can't be read is left out (the run itself says so), and so are the rows of a data class of the user's own.
    """
    found = {}
    for name, content in (("data", _data), ("validation", _validation), ("template", _template), ("weights", _weights)):
        try:
            found[name] = hashlib.sha256(json.dumps(content(cfg)).encode()).hexdigest()
        except (OSError, UserError, AttributeError):
            continue
    return found


def changed(before: Mapping[str, object], now: Mapping[str, str]) -> list[str]:
    """The names of the digests that both have and that differ."""
    return [name for name in now if name in before and before[name] != now[name]]


def short(inputs: Mapping[str, str]) -> str:
    """Eight characters that stand for all of them."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:8]


def _data(cfg: DictConfig) -> object:
    return _contents(cfg, "data.path")


def _validation(cfg: DictConfig) -> object:
    """What losses are measured on: rows of their own, or those held out of the training rows."""
    data: TrainingData = built(cfg.data)
    part = [data.max_validation_rows, cfg.trainer.validation_batches, data.where]
    if data.validation_path is not None:
        return [_contents(cfg, "data.validation_path"), *part]
    return [_contents(cfg, "data.path"), data.validation_fraction, data.split_seed, *part]


def _contents(cfg: DictConfig, wanted: str) -> list[str]:
    """Digests of the files that a key names, in order; names of what lies elsewhere."""
    data: TrainingData = built(cfg.data)
    cache = cache_root(cfg.cache_dir)
    contents = []
    for source in data.all_sources():
        if source.key != wanted:
            continue
        for one in [source.path] if isinstance(source.path, str) else source.path:
            if one.startswith(ELSEWHERE):
                contents.append(one)
            else:
                files = sources.files(one, source.key, cache, source.kinds)
                contents += fingerprint.files_beside(files, cache / "data")
    return contents


def _template(cfg: DictConfig) -> object:
    """The template's file, and the tokenizer's where it is on this machine."""
    contents = []
    if cfg.template.get("file") is not None:
        contents.append(_digest(expand_home(cfg.template.file)))
    folder = expand_home(cfg.model.tokenizer or cfg.model.path)
    for name in TOKENIZER:
        if (folder / name).is_file():
            contents.append(_digest(folder / name))
    return contents


def _weights(cfg: DictConfig) -> object:
    """The base model's configuration and weights, where they are on this machine."""
    folder = expand_home(cfg.model.path)
    if cfg.model.random_init or not folder.is_dir():
        return []
    return [_digest(folder / "config.json"), fingerprints.weights(folder)]


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
