"""One rank of a run: `python -m posttrain.worker RUN_DIR`, started by launch.py with torch's environment set.

Reads the frozen configuration, applies the patches this platform needs, instantiates the groups, trains.
"""

import faulthandler
import logging
import os
import signal
import sys
import time
import traceback
from pathlib import Path

from posttrain.errors import RunFailed, UserError
from posttrain.files import write_json
from posttrain.rollback import RolledBack

log = logging.getLogger("posttrain")

GROUPS = ("model", "peft", "data", "template", "parallelism", "optimizer", "scheduler", "precision", "checkpoint")


def build(run_dir: Path):
    """The trainer of the run in `run_dir`, with everything it is composed of."""
    from posttrain.launch import STARTED
    from posttrain.startup import Startup

    startup = Startup(float(os.environ.get(STARTED, time.time())))
    startup.mark("compose and launch")
    import torch  # noqa: F401  (before Transformer Engine, which needs torch's NCCL loaded)
    from omegaconf import OmegaConf

    from posttrain import patches, targets
    from posttrain.launch import DEVICE

    cfg = OmegaConf.load(run_dir / "config.yaml")
    targets.check(cfg)

    device = os.environ.get(DEVICE, "cpu")
    platform = patches.Platform.detect(device)
    applied = patches.apply(platform)
    log.info("device %s, Transformer Engine %s, patches: %s", device, platform.transformer_engine, ", ".join(applied))

    from hydra.utils import instantiate

    from posttrain.data.check import built

    parts = {name: built(cfg[name]) if cfg[name].get("_target_") else None for name in GROUPS}
    trackers = [built(tracker) for tracker in cfg.logger.values()]
    # Partial: Hydra would turn the instantiated objects among its arguments into configuration again.
    trainer = instantiate(cfg.trainer, _partial_=True)
    startup.mark("import torch, instantiate")
    return trainer(**parts, trackers=trackers, platform=platform, run_dir=run_dir, frozen=cfg, startup=startup)


def main() -> None:
    """Train; on an error leave RUN_DIR/logs/rankN.error.json for the launcher and exit with its code."""
    run_dir, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)  # the launcher asks a run that hangs where it is
    error_file = run_dir / "logs" / f"rank{rank}.error.json"
    try:
        build(run_dir).fit()
    except SystemExit as stop:
        # Megatron leaves the training loop by sys.exit(0) after it has saved on a signal, and elsewhere by sys.exit()
        # or another code when it gives up; a run that is done returns.
        raise SystemExit(RunFailed.STOPPED if stop.code == 0 else 1) from None
    except BaseException as error:
        traceback.print_exc()
        user_error = isinstance(error, UserError)
        message = str(error) if user_error else f"{type(error).__name__}: {error}"
        found = {"rank": rank, "time": time.time(), "user_error": user_error, "message": message}
        if isinstance(error, RolledBack):
            found |= {"rolled_back": True, "message": str(error)}
        write_json(error_file, found)
        sys.stdout.flush()
        # Not sys.exit: peers may be in a collective with us, and tearing down process groups would wait for them.
        os._exit(UserError.exit_code if user_error else 1)


if __name__ == "__main__":
    main()
