"""A model in Hugging Face's form: a directory, a hub id, or the demo model; the object of the config group `model`."""

import logging
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from posttrain.demo.weights import ensure_smollm2
from posttrain.errors import NoSuchModel, UserError
from posttrain.models.bridges import register
from posttrain.models.config_checks import check_config
from posttrain.models.headers import read_json
from posttrain.models.hf_adapter import CONFIG, WEIGHTS, base_name, base_of, is_adapter, saved_vocabulary
from posttrain.models.shapes import check_directory
from posttrain.models.tokenizer_files import check_files, check_loaded, check_spec, failures
from posttrain.models.vocabulary import grown, is_vocabulary
from posttrain.patches.startup.imports import import_bridge
from posttrain.utils.escape import shorten

if TYPE_CHECKING:
    import torch
    from megatron.bridge import AutoBridge
    from transformers import PretrainedConfig, PreTrainedTokenizerFast

log = logging.getLogger(__name__)
DEMO = "demo:"
LONGEST_REASON = 300  # characters of what a library says
TRUST = "POSTTRAIN_TRUST_REMOTE_CODE"  # environment variable; a configuration alone can't have code run
# Everything a model needs and nothing else: no pickles, and Python files only where they are asked for.
CONFIG_FILES = ["*.json", "*.txt", "*.model", "*.jinja"]


@dataclass
class HFModel:
    """Where the weights, the architecture and the tokenizer come from.

    Attributes:
        path: a Hugging Face directory, a hub id, `demo:smollm2_135m`, or a PEFT directory to continue from.
        tokenizer: directory or hub id of the tokenizer; None: the same as `path`.
        random_init: random weights of the architecture instead of those at `path`.
        trust_remote_code: run Python code that comes with the model.
        architecture: config.json fields, for what must be known without reading `path`.
        learning_rate_scale: what conf/peft multiplies its learning rate by; the model itself has no use for it.
        moved_base: directory or hub id of an adapter's base; None: what its configuration names.
        rows: of the embedding, where it has more than its files; see `grow`.
    """

    path: str
    tokenizer: str | None = None
    random_init: bool = False
    trust_remote_code: bool = False
    architecture: Mapping[str, Any] | None = None
    learning_rate_scale: float = 1.0
    moved_base: str | None = field(default=None, init=False)
    rows: int | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if self.adapter is None:
            return
        saved = saved_vocabulary(self.adapter)
        if saved:
            self.rows = max(tensor.shape[0] for tensor in saved.values())

    @property
    def is_local(self) -> bool:
        """Whether `path` is a directory of this machine (the demo model becomes one), not a hub id."""
        return self.path.startswith(DEMO) or Path(self.path).is_dir()

    @property
    def adapter(self) -> Path | None:
        """The PEFT directory, where `path` is one."""
        return Path(self.path) if is_adapter(Path(self.path)) else None

    @property
    def base(self) -> str:
        """`path`, or the base model of the adapter there."""
        if self.moved_base is not None:
            return self.moved_base
        return base_of(self.adapter) if self.adapter else self.path

    @cached_property
    def directory(self) -> Path:
        """The directory with weights and config, checked; a hub model is downloaded first (safetensors only)."""
        try:
            config = fetch(self.base, ["config.json"]) / "config.json"
        except NoSuchModel as error:
            if not self.adapter:
                raise
            raise NoSuchModel(
                error.reason,
                f"{self.adapter}: its base model {self.base}: {error.reason}; write its place as "
                f"base_model_name_or_path into {CONFIG}",
            ) from None
        if config.is_file():
            check_config(read_json(config), f"{config}: ")  # before the weights are downloaded
        directory = fetch(self.base, [*CONFIG_FILES, "*.safetensors", *self._code])
        if self.adapter and is_adapter(directory):  # transformers would give it to PEFT as it is
            raise UserError(f"{self.adapter}: its base model {directory} is an adapter itself; merge that one first")
        check_files(directory)
        check_directory(directory)
        return directory

    @property
    def tokenizer_path(self) -> str:
        """The directory of the tokenizer; a hub's is downloaded first."""
        if self.tokenizer is not None:
            return str(fetch(self.tokenizer, [*CONFIG_FILES, *self._code], "model.tokenizer"))
        path = self.path
        if self.adapter and not (self.adapter / "tokenizer_config.json").is_file():
            path = self.base
        return str(fetch(path, [*CONFIG_FILES, *self._code]))

    def check_hub(self) -> None:
        """Ask the hub for the least of what a run will want of it: it tells of a gated or missing model.

        Raises:
            NoSuchModel: neither the hub nor its cache gives it.
        """
        places = {}
        if not (self.random_init and self.architecture is not None):
            places["model.path"] = self.base
        if self.tokenizer is not None:
            places["model.tokenizer"] = self.tokenizer
        for key, place in places.items():
            if is_hub_id(place):
                fetch(place, ["config.json"], key)

    @property
    def file_rows(self) -> int:
        """Rows of the embedding in the files."""
        rows: int = self._hf_config().vocab_size
        return rows

    def grow(self, tokens: int) -> None:
        """See that the embedding, and the output matrix with it, has a row for each of `tokens` tokens."""
        before = self.hf_config().vocab_size
        if tokens > before:
            log.warning("model: the embedding grows from %d to %d rows, one for each token", before, tokens)
            self.rows = tokens

    def vocabulary(self, name: str, weight: "torch.Tensor") -> "torch.Tensor":
        """What this model has in place of the tensor `name` of its base.

        Args:
            name: as in the base's files.
            weight: that tensor, of any shape.

        Returns:
            An embedding or output matrix [rows, hidden] as the adapter holds it, else grown; others as they are.
        """
        if self.rows is None or not is_vocabulary(name):
            return weight
        if self.adapter and name in saved_vocabulary(self.adapter):
            with safe_open(self.adapter / WEIGHTS, framework="pt") as file:
                stored = next(key for key in file.keys() if base_name(key) == name)  # noqa: SIM118  (it is no mapping)
                weight = file.get_tensor(stored).to(weight.dtype)
        return grown(weight, self.rows)

    def hf_config(self) -> "PretrainedConfig":
        """Return the transformers config: of `path`, or of `architecture` where the weights are random.

        Raises:
            UserError: neither is there, or transformers does not know the architecture.
        """
        config = self._hf_config()
        if self.rows is not None:
            config.vocab_size = self.rows
        return config

    def _hf_config(self) -> "PretrainedConfig":
        from transformers import AutoConfig

        try:
            if self.random_init and self.architecture is not None:
                fields = plain(self.architecture)
                check_config(fields, "model.architecture.")
                return AutoConfig.for_model(fields.pop("model_type"), **fields)
            directory = self.directory if not self.random_init else fetch(self.path, [*CONFIG_FILES, *self._code])
            fields = read_json(directory / "config.json")
            check_config(fields, f"{directory / 'config.json'}: ")
            import_bridges(fields)
            return AutoConfig.from_pretrained(directory, trust_remote_code=self._trusted())
        except UserError:
            raise
        except Exception as error:  # of whatever kind: a stranger's file
            reason = shorten(" ".join(str(error).split()), LONGEST_REASON)
            raise UserError(f"model.path={self.path}: transformers cannot read its configuration: {reason}") from error

    def load_tokenizer(self) -> "PreTrainedTokenizerFast":
        """Return the fast tokenizer.

        Raises:
            UserError: there is none, only a slow one, or one that the library can't read.
        """
        from transformers import AutoTokenizer

        path = self.tokenizer_path
        check_files(Path(path))
        check_spec(Path(path))
        trusted = self._trusted()
        failure = "no tokenizer can be read"
        if not (Path(path) / "tokenizer.json").is_file():
            failure = "has no tokenizer.json; give the directory of one"
        with failures(path, failure):
            tokenizer = AutoTokenizer.from_pretrained(path, use_fast=True, trust_remote_code=trusted)
        if not tokenizer.is_fast:
            raise UserError(f"model.tokenizer: {path} has no fast tokenizer (tokenizer.json); save it with one first")
        check_loaded(tokenizer.backend_tokenizer, Path(path))
        return tokenizer

    def bridge(self) -> "AutoBridge":
        """Return the `megatron.bridge.AutoBridge` of this model, with its weights unless they are random.

        Raises:
            UserError: there is no bridge for the architecture.
        """
        from megatron.bridge import AutoBridge

        config = self.hf_config()
        for architecture in config.architectures or ():
            register(architecture)
        known = set(AutoBridge.list_supported_models())
        if not AutoBridge.supports(config) or known.isdisjoint(config.architectures or ()):
            raise UserError(
                f"model.path={self.path}: no bridge to Megatron for the architecture {config.architectures}"
            )
        if self.random_init:
            return AutoBridge.from_hf_config(config)
        bridge = AutoBridge.from_hf_pretrained(self.directory, trust_remote_code=self._trusted())
        if self.rows is not None:
            bridge.hf_pretrained.config = config
            source = bridge.hf_pretrained.state.source
            load = source.load_tensors

            def load_grown(names: list[str]) -> "dict[str, torch.Tensor]":
                return {name: self.vocabulary(name, weight) for name, weight in load(names).items()}

            source.load_tensors = load_grown
        return bridge

    @property
    def _code(self) -> list[str]:
        return ["*.py"] if self.trust_remote_code else []

    def _trusted(self) -> bool:
        if self.trust_remote_code:
            check_trust(self.path)
            log.warning("model.trust_remote_code=true: Python code from %s runs with your rights", self.path)
        return self.trust_remote_code


def check_trust(path: str) -> None:
    """Raise a UserError unless the environment allows what `model.trust_remote_code=true` asks for."""
    if os.environ.get(TRUST) != "1":
        raise UserError(
            f"model.trust_remote_code=true: Python code from {path} would run with your rights; if you trust it, say "
            f"so with the environment variable {TRUST}=1 as well"
        )


def is_hub_id(path: str) -> bool:
    """Whether `path` is OWNER/NAME, and no directory of this machine."""
    return path.count("/") == 1 and not path.startswith((DEMO, ".", "/", "~")) and not Path(path).is_dir()


def fetch(path: str, patterns: list[str], key: str = "model.path") -> Path:
    """Return the directory of `path`, after a download of the files that match `patterns` if it is a hub id.

    Args:
        path: a directory, a hub id or the demo model.
        patterns: of files that a hub's model is needed for.
        key: that has `path`, for errors.

    Raises:
        NoSuchModel: no such directory, or the hub does not give the model.
    """
    if path == f"{DEMO}smollm2_135m":
        return ensure_smollm2()
    if Path(path).is_dir():
        return Path(path)
    if not is_hub_id(path):
        raise NoSuchModel("no such directory", f"{key}={path}: no such directory; give one, or a hub id")
    from posttrain.models.hub import download

    return download(path, patterns, key)


def import_bridges(fields: Mapping[str, Any]) -> None:
    """Import the bridges of a config.json's architectures, where Megatron is used: some bring their configuration."""
    if "megatron.bridge" in sys.modules:
        for architecture in fields.get("architectures") or ():
            import_bridge(architecture)


def plain(value: object) -> Any:
    """Return `value` with OmegaConf's containers as dicts and lists, which transformers can serialise."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, str) or not hasattr(value, "__iter__"):
        return value
    return list(map(plain, value))
