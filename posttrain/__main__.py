"""`python -m posttrain`: compose the configuration, check it, start the processes that train."""

import sys
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from posttrain import check, compose, help, launch


def task(cfg: DictConfig) -> float | None:
    """One run; returns its last validation loss so that a sweeper can compare trials."""
    gpus = launch.visible_gpus()
    check.check(cfg, gpus)
    return launch.launch(cfg, Path(HydraConfig.get().runtime.output_dir), gpus)


def main() -> None:
    """Entry point of `python -m posttrain` and of the `posttrain` script."""
    if {"--help", "-h"} & set(sys.argv[1:]):
        print(help.screen(compose.CONF_DIR, compose.PACKAGE))
        return
    compose.run(task, check=lambda cfg: check.check(cfg, launch.visible_gpus()))


if __name__ == "__main__":
    main()
