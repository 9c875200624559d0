"""What a configuration may change of Hydra itself, and what its files may be.

Hydra builds sweepers, launchers and callbacks, sets up logging and changes the environment from its own part of the
configuration, before a program sees any of it, and any file of a configuration may reach that part. So each
configuration is looked at where Hydra composes it. A launcher's shell commands come from its own file, chosen on the
command line, or from the command line itself.
"""

from pathlib import Path
from typing import Any

import hydra._internal.hydra
import yaml
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra._internal.core_plugins.importlib_resources_config_source import ImportlibResourcesConfigSource
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult
from omegaconf import DictConfig, OmegaConf

from posttrain import confidential, targets, yaml_file
from posttrain.errors import UserError

EMPTY = ("callbacks", "env", "job.env_set", "job.env_copy")
LOGGING = {"version", "root", "disable_existing_loggers", "incremental"}  # without handlers nor factories
OF_LAUNCHER = ("hydra/launcher=", "hydra.launcher.", "hydra.searchpath=")
COMMANDS = ("setup", "python", "srun_args", "sbatch", "container_image", "container_mounts")


class Loader(ConfigLoaderImpl):
    """Composes as Hydra's loader does, and refuses what may not be changed."""

    def load_configuration(self, config_name: str | None, overrides: list[str], *args: Any, **kwargs: Any) -> Any:
        """Every composed configuration comes from here: runs, trials, `--cfg`, `--info`.

        Raises:
            UserError: see `check`.
        """
        try:
            cfg = super().load_configuration(config_name, overrides, *args, **kwargs)
        except (KeyError, ValueError) as error:  # Hydra's own: `model=0`, a variable that isn't there
            raise UserError(f"the configuration can't be composed: {' '.join(str(error).split())}") from error
        check(cfg.hydra)
        confidential.check(OmegaConf.to_container(cfg, resolve=False))  # before Hydra writes it down
        told = {name: cfg.hydra.launcher.get(name) for name in COMMANDS if cfg.hydra.launcher.get(name)}
        if told:
            words = [word for word in overrides if word.lstrip("+~").startswith(OF_LAUNCHER)]
            own = super().load_configuration(config_name, words, *args, **kwargs).hydra.launcher
            foreign = [name for name, value in told.items() if own.get(name) != value]
            if foreign:
                raise UserError(
                    f"hydra.launcher.{foreign[0]}: runs commands, so it is taken from the command line, or from a file "
                    "chosen there with hydra/launcher=, and from no other part of a configuration"
                )
        return cfg


class Files(FileConfigSource):
    """Hydra's source of YAML files; a file is looked at before it is built."""

    def load_config(self, config_path: str) -> ConfigResult:
        """As Hydra's.

        Raises:
            UserError: see `yaml_file.check`.
        """
        path = Path(self.path, self._normalize_file_name(config_path))
        try:
            if path.is_file():
                yaml_file.check(path.read_text(encoding="utf-8"), path)
            return super().load_config(config_path)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None


class Packages(ImportlibResourcesConfigSource):
    """Hydra's source of configurations within packages, for Hydra's own: looking into another one would import it."""

    def __init__(self, provider: str, path: str) -> None:
        if path.removeprefix("pkg://") != "hydra.conf":
            raise UserError(f"hydra.searchpath: {path}: only folders (file://)")
        super().__init__(provider, path)


def install() -> None:
    """Put both into Hydra; may be called again."""
    Plugins.instance()  # registers Hydra's own sources
    hydra._internal.hydra.ConfigLoaderImpl = Loader
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
    if space is not None and not targets.allowed(str(space)):
        raise UserError(
            f"hydra.sweeper.custom_search_space={space}: a configuration may not name code; see {targets.ENVIRONMENT}"
        )
    for key, value in settings.launcher.items():
        for text in [value] if isinstance(value, str) else value if isinstance(value, list) else ():
            if any(ord(char) < 32 for char in str(text)) and key not in COMMANDS:
                raise UserError(f"hydra.launcher.{key}: holds a line end or control character")
    subdir = settings.output_subdir
    if subdir is not None and (Path(subdir).name != subdir or subdir in (".", "..")):
        raise UserError(f"hydra.output_subdir={subdir}: must be a plain name within the run directory")
