"""`python -m posttrain`: compose the configuration, check it, start the processes that train."""

import sys
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from posttrain import check, compose, help, launch, nodes
from posttrain.errors import UserError


def task(cfg: DictConfig) -> float | None:
    """One run; returns its last validation loss so that a sweeper can compare trials."""
    nodes.adopt(cfg)
    gpus = launch.visible_gpus()
    check.check(cfg, gpus)
    return launch.launch(cfg, Path(HydraConfig.get().runtime.output_dir), gpus)


def before(cfg: DictConfig) -> None:
    """What can be refused before there is a directory for the run."""
    nodes.adopt(cfg)
    nodes.check_directory(cfg, sys.argv)
    check.check(cfg, launch.visible_gpus())


def main() -> None:
    """Entry point of `python -m posttrain` and of the `posttrain` script."""
    if {"--help", "-h"} & set(sys.argv[1:]):
        print(help.screen(compose.CONF_DIR, compose.PACKAGE))
        return
    try:
        sys.argv[1:] = nodes.agree_on_directory(sys.argv[1:])
    except UserError as error:
        compose.fail(str(error))
    compose.run(task, check=before)


if __name__ == "__main__":
    main()
