"""`hydra/sweeper=optuna`: a search instead of a grid, by Hydra's own plugin with defaults that suit training runs.

With a fixed seed the same command proposes the same trials: what is finished is not run again, and a larger
`hydra.sweeper.n_trials` continues from there. No database is needed for that.
"""

from dataclasses import dataclass

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigLoadError
from omegaconf import DictConfig

from posttrain.errors import UserError
from posttrain.spec.resolve import has_validation

SEED = 1234


@dataclass(frozen=True)
class Search:
    """How the trials of a search come one after the other.

    Attributes:
        trials: of the whole search, at most: those that have finished already are not run again.
        at_once: trials that are proposed together; the next ones follow from what all before them have given.
    """

    trials: int
    at_once: int


def search_of(cfg: DictConfig) -> Search | None:
    """The search that a configuration asks for with its sweeper; None: a grid.

    Args:
        cfg: composed with `hydra`.
    """
    sweeper = cfg.hydra.sweeper
    if "n_trials" not in sweeper:
        return None
    return Search(sweeper.n_trials, min(sweeper.n_jobs, sweeper.n_trials))


def check(cfg: DictConfig) -> None:
    """Refuse a search without a measure: it minimises the validation loss.

    Args:
        cfg: composed with `hydra`.

    Raises:
        UserError: there is no validation set.
    """
    if search_of(cfg) and not has_validation(cfg.data):
        raise UserError(
            "hydra/sweeper=optuna: minimises the validation loss, and there is no validation set; set "
            "data.validation_fraction or data.validation_path"
        )


def set_defaults(arguments: list[str]) -> None:
    """Change the plugin's configuration as it is registered; a YAML file of the same name would be refused by Hydra.

    Args:
        arguments: of the command line.

    Raises:
        UserError: the command asks for the plugin, and it is not installed.
    """
    Plugins.instance()  # imports the plugins, which register their configurations
    store = ConfigStore.instance()
    try:
        sweeper = store.load("hydra/sweeper/optuna.yaml").node
    except ConfigLoadError:
        if "hydra/sweeper=optuna" in arguments:
            raise UserError("hydra/sweeper=optuna: is not installed; run `uv sync --extra sweep`") from None
        return
    sweeper.n_jobs = "${sweep.parallel}"  # proposed at a time
    sweeper.max_failure_rate = 1.0  # a failed trial is a bad one, not the end of the search
    store.store(group="hydra/sweeper", name="optuna", node=sweeper, provider="posttrain")
    for file in store.list("hydra/sweeper/sampler"):
        sampler = store.load(f"hydra/sweeper/sampler/{file}").node
        if "seed" in sampler:
            sampler.seed = SEED
            store.store(
                group="hydra/sweeper/sampler", name=file.removesuffix(".yaml"), node=sampler, provider="posttrain"
            )
