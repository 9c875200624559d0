"""What a configuration may change of Hydra itself, and what its files may be.

Hydra builds sweepers, launchers and callbacks, sets up logging and changes the environment from its own part of the
configuration, before a program sees any of it, and any file of a configuration may reach that part. So each
configuration is looked at where Hydra composes it, and compared with what the command line alone gives (policy.py).
"""

import copy
from dataclasses import fields
from pathlib import Path

import hydra._internal.hydra
import hydra.core.utils
import yaml
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra._internal.core_plugins.importlib_resources_config_source import ImportlibResourcesConfigSource
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.config_source import ConfigLoadError, ConfigResult
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.base import Node

from posttrain.config import expansion, policy, schema, secrets, targets, yaml_file
from posttrain.config.overrides import quote_choices
from posttrain.errors import UserError
from posttrain.patches.elsewhere import HYDRA_GUARD
from posttrain.patches.registry import require
from posttrain.utils import rundir
from posttrain.utils.atomic_files import read_text

EMPTY = ("callbacks", "env", "job.env_set", "job.env_copy")
LOGGING = {"version", "root", "disable_existing_loggers", "incremental"}  # without handlers nor factories
COMMANDS = ("setup", "python")  # of a launcher: shell lines
PATHS = ("run.dir", "sweep.dir", "sweep.subdir", "job.name", "output_subdir")
SPACE = "hydra.sweeper.params"
OWN_GROUPS = ("hydra/launcher/", "hydra/sweeper/")  # of Hydra's, of which there may be files besides the shipped ones


class UndeclaredKey(HydraException):
    """A key was added, as by `+key=value`, where the schema has all keys that there are.

    Args:
        key: its path.
    """

    def __init__(self, key: str) -> None:
        super().__init__(f"`{key}`: unknown key")
        self.key = key


_others: list[Path] = []  # files that take part in what is being composed, the shipped ones aside
# By provider, path and text: a command composes three times and more, and parsing is a fifth of composing.
_parsed: dict[tuple[str, Path, str], ConfigResult] = {}
_command: list[str] = ["config"]  # what the command composes unless --config-name says otherwise


class Loader(ConfigLoaderImpl):
    """Composes as Hydra's loader does, and refuses what may not be changed."""

    def load_configuration(
        self,
        config_name: str | None,
        overrides: list[str],
        run_mode: RunMode,
        from_shell: bool = True,
        validate_sweep_overrides: bool = True,
    ) -> DictConfig:
        """Every composed configuration comes from here: runs, trials, `--cfg`, `--info`.

        Raises:
            UserError: see `check` and `policy.check`.
            UndeclaredKey: there is a key that the schema doesn't have.
        """

        def composed(words: list[str], name: str | None = config_name) -> tuple[DictConfig, list[Path]]:
            _others.clear()
            load = super(Loader, self).load_configuration
            cfg = load(name, words, run_mode, from_shell, validate_sweep_overrides)
            return cfg, list(_others)

        overrides = quote_choices(overrides, policy.SHIPPED)
        try:
            cfg, others = composed(overrides)
        except RecursionError:
            raise UserError(
                "the configuration can't be composed: it is nested too deep, or a file includes itself"
            ) from None
        except (KeyError, ValueError, AttributeError, AssertionError) as error:  # Hydra's own: `hydra: null`
            if any(word.lstrip("+").startswith(SPACE) for word in overrides):
                raise UserError(f"`{SPACE}`: is a file's; here the keys themselves: --multirun seed=1,2") from error
            raise UserError(f"the configuration can't be composed: {' '.join(str(error).split())}") from error
        for key in schema.undeclared(cfg):
            raise UndeclaredKey(key)
        check(cfg.hydra)
        secrets.check(OmegaConf.to_container(cfg, resolve=False))  # before Hydra writes it down
        if others:
            expansion.check(cfg)
            base = config_name if _is_shipped(config_name) else _command[0]
            policy.check(cfg, overrides, others, lambda words: composed(words, base))
        return cfg


def _is_shipped(name: str | None) -> bool:
    """Whether a configuration is shipped, or made of what is (a recipe)."""
    return name is not None and ((policy.SHIPPED / f"{name}.yaml").is_file() or _in_store(name))


def _in_store(path: str) -> bool:
    """Whether Hydra's ConfigStore has it: types and defaults of Hydra's, of plugins' and of posttrain's."""
    try:
        ConfigStore.instance().load(f"{path.removesuffix('.yaml')}.yaml")
    except ConfigLoadError:
        return False
    return True


class Files(FileConfigSource):
    """Hydra's source of YAML files; a file is looked at before it is built."""

    def load_config(self, config_path: str) -> ConfigResult:
        """As Hydra's.

        Raises:
            UserError: see `yaml_file.check`; it lies elsewhere, by `..` or a link; or it would take the place of a
                file of Hydra's or of posttrain's.
        """
        path = Path(self.path, self._normalize_file_name(config_path))
        folder = Path(self.path).resolve()
        own = folder == policy.SHIPPED.resolve()
        if ".." in Path(config_path).parts or not (own or path.resolve().is_relative_to(folder)):
            raise UserError(f"{path}: leads out of the folder {self.path}; a configuration is made of the files in it")
        if path.is_file() and not own:
            group = config_path.lstrip("/")
            if _in_store(group) or (group.startswith("hydra/") and not group.startswith(OWN_GROUPS)):
                raise UserError(f"{path}: takes the place of what Hydra or posttrain define; choose another name")
            _others.append(path)
        if not path.is_file():
            return super().load_config(config_path)
        try:
            key = self.provider, path, read_text(path)
            if key not in _parsed:
                yaml_file.check(key[-1], path)
                _parsed[key] = super().load_config(config_path)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
        return copy.deepcopy(_parsed[key])  # Hydra takes the defaults list out of it


class Packages(ImportlibResourcesConfigSource):
    """Hydra's source of configurations within packages, for Hydra's own: looking into another one would import it."""

    def __init__(self, provider: str, path: str) -> None:
        if path.removeprefix("pkg://") != "hydra.conf":
            raise UserError(f"hydra.searchpath: {path}: only folders (file://)")
        super().__init__(provider, path)


def save_config(cfg: DictConfig, filename: str, output_dir: Path) -> None:
    """In place of Hydra's own, which writes through links: a file of the run directory's `.hydra`.

    Raises:
        UserError: something in the run directory is a link.
    """
    run_dir, folder = output_dir.parent, output_dir.name
    rundir.make(run_dir, folder)
    rundir.write_text(run_dir, f"{folder}/{filename}", OmegaConf.to_yaml(cfg), flush=False)


def install(command: str | None = None) -> None:
    """Put all of it into Hydra; may be called again.

    Args:
        command: the configuration that this command composes; None: as before.

    Raises:
        UserError: it is a Hydra that may not have what is replaced here.
    """
    require(HYDRA_GUARD)
    if command is not None:
        _command[0] = command
    expansion.register()
    Plugins.instance()  # registers Hydra's own sources
    hydra._internal.hydra.ConfigLoaderImpl = Loader  # type: ignore[attr-defined]
    hydra.core.utils._save_config = save_config
    SourcesRegistry.instance().types |= {"file": Files, "pkg": Packages}


def check(settings: DictConfig) -> None:
    """Look at the composed `hydra`.

    Raises:
        UserError: it builds something, runs something, or writes outside the run directory.
    """
    for name in EMPTY:
        if OmegaConf.select(settings, name):
            raise UserError(f"hydra.{name}: a configuration may not set it; it could run anything")
    for name in ("job_logging", "hydra_logging"):
        extra = sorted(set(map(str, settings[name] or ())) - LOGGING)
        if extra or (settings[name] and settings[name].get("root")):
            raise UserError(f"hydra.{name}.{(extra or ['root'])[0]}: a configuration may not set it; logs are in logs/")
    for name in ("launcher", "sweeper"):
        for path, target in targets.walk(settings[name], f"hydra.{name}"):
            if not isinstance(target, str) or not targets.allowed_in_hydra(target):
                raise UserError(f"{path}={target}: not a target that a configuration may name")
    space = settings.sweeper.get("custom_search_space")
    if space is not None and not (
        targets.allowed_by_user(str(space)) and targets.is_own(str(space), "hydra.sweeper.custom_search_space")
    ):
        raise UserError(
            f"hydra.sweeper.custom_search_space={space}: a configuration may not name code; see {targets.ENVIRONMENT}"
        )
    if settings.sweeper.get("storage") is not None:
        raise UserError(
            "hydra.sweeper.storage: not supported, the sweeper's Optuna 2 doesn't work with SQLAlchemy 2; none is "
            "needed: the same command proposes the same trials, and resumes after those that are finished"
        )
    _check_numbers(settings)
    for place, text in policy.texts(settings.launcher, "hydra.launcher"):
        name = place.removeprefix("hydra.launcher.").partition("[")[0]
        if policy.CONTROL.search(text) and name not in COMMANDS:
            raise UserError(f"{place}: holds a line end or control character")
    for name in PATHS:
        if policy.CONTROL.search(str(_written_value(settings, name))):
            raise UserError(f"hydra.{name}: holds a line end or control character")
    subdir = settings.output_subdir
    if subdir is not None and (Path(subdir).name != subdir or subdir in (".", "..")):
        raise UserError(f"hydra.output_subdir={subdir}: must be a plain name within the run directory")


def _written_value(settings: DictConfig, path: str) -> object:
    """The value at a key path as it is written, interpolations unresolved."""
    node: object = settings
    for part in path.split("."):
        assert isinstance(node, DictConfig)
        node = node._get_node(part)
    assert isinstance(node, Node)
    return node._value()


def _check_numbers(settings: DictConfig) -> None:
    """Numbers of the launcher, the sweeper and its sampler within their limits."""
    if settings.launcher.get("_target_") == schema.SlurmSchema._target_:
        limits = {field.name: dict(field.metadata) for field in fields(schema.SlurmSchema) if field.metadata}
        schema.check(settings.launcher, limits, "hydra.launcher.")
    schema.check(settings.sweeper, schema.SWEEPER, "hydra.sweeper.")
    sampler = settings.sweeper.get("sampler")
    if isinstance(sampler, DictConfig):
        limits = {}
        for key, value in sampler.items():
            if type(value) in (int, float):
                limits[str(key)] = schema.SAMPLER_SEED if key == "seed" else schema.SAMPLER
        schema.check(sampler, limits, "hydra.sweeper.sampler.")
