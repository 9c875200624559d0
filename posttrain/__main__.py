"""`python -m posttrain`: compose the configuration, check it, start the processes that train."""

from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from posttrain import compose


def task(cfg: DictConfig) -> float | None:
    """One run; returns its last validation loss so that a sweeper can compare trials."""
    from posttrain import launch
    from posttrain.check import check

    gpus = launch.visible_gpus()
    check(cfg, gpus)
    return launch.launch(cfg, Path(HydraConfig.get().runtime.output_dir), gpus)


def main() -> None:
    """Entry point of `python -m posttrain` and of the `posttrain` script."""
    compose.run(task)


if __name__ == "__main__":
    main()
