"""One rank of a run: `python -m posttrain.worker RUN_DIR`, started by launch.py with torch's environment set; without
RUN_DIR it imports and waits to be told (early.py).

Reads the frozen configuration, applies the patches this platform needs, instantiates the groups, trains.
"""

import contextlib
import faulthandler
import importlib
import logging
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

from posttrain import early, patches, rundir
from posttrain.errors import RunFailed, UserError, of_place
from posttrain.rollback import RolledBack

log = logging.getLogger("posttrain")

# What every run imports sooner or later.
USED = (
    "hydra.utils", "megatron.bridge.training.finetune", "transformers.models.auto.tokenization_auto",
    "posttrain.callbacks", "posttrain.provider", "posttrain.step", "posttrain.peft.fused", "posttrain.data",
    "posttrain.trainer",
)  # fmt: skip
GROUPS = ("model", "peft", "data", "template", "parallelism", "optimizer", "scheduler", "precision", "checkpoint")


def import_all() -> patches.Platform:
    """Apply the patches that this platform needs and import what a training run uses; on a GPU, wake it up meanwhile.

    Returns:
        The platform.
    """
    import torch  # noqa: F401  (before Transformer Engine, which needs torch's NCCL loaded)

    from posttrain.launch import DEVICE

    device = os.environ.get(DEVICE, "cpu")
    if device == "cuda":
        threading.Thread(target=wake_gpu, daemon=True).start()
    platform = patches.Platform.detect(device)
    patches.apply(platform)
    for module in USED:
        importlib.import_module(module)
    return platform


def wake_gpu() -> None:
    """Create the device's context and load cuBLAS while this process imports; both wait for the driver."""
    import torch

    with contextlib.suppress(Exception):  # it is asked again, and its error shown, where it is used
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        ones = torch.ones(256, 256, dtype=torch.bfloat16, device=device)
        (ones @ ones).sum().item()


def build(run_dir: Path):
    """The trainer of the run in `run_dir`, with everything it is composed of."""
    from posttrain.launch import STARTED
    from posttrain.startup import Startup

    startup = Startup(float(os.environ.get(STARTED, time.time())))
    startup.mark("compose, import" if "posttrain.trainer" in sys.modules else "compose, launch")
    from posttrain import frozen, targets

    cfg = frozen.read(run_dir)
    targets.check(cfg)
    platform = import_all()
    applied = ", ".join(patches.apply(platform))
    log.info("device %s, Transformer Engine %s, patches: %s", platform.device, platform.transformer_engine, applied)

    from hydra.utils import instantiate

    from posttrain.data.check import built

    parts = {name: built(cfg[name]) if cfg[name].get("_target_") else None for name in GROUPS}
    trackers = [built(tracker) for tracker in cfg.logger.values()]
    # Partial: Hydra would turn the instantiated objects among its arguments into configuration again.
    targets.require_own(cfg.trainer)
    trainer = instantiate(cfg.trainer, _partial_=True)
    startup.mark("import")
    return trainer(**parts, trackers=trackers, platform=platform, run_dir=run_dir, frozen=cfg, startup=startup)


def main() -> None:
    """Train; on an error leave RUN_DIR/logs/rankN.error.json for the launcher and exit with its code."""
    given = sys.argv[1] if len(sys.argv) > 1 else early.await_orders()
    if given is None:
        return
    run_dir, rank = Path(given), int(os.environ["RANK"])
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)  # the launcher asks a run that hangs where it is
    try:
        build(run_dir).fit()
    except SystemExit as stop:
        # Megatron leaves the training loop by sys.exit(0) after it has saved on a signal, and elsewhere by sys.exit()
        # or another code when it gives up; a run that is done returns.
        raise SystemExit(RunFailed.STOPPED if stop.code == 0 else 1) from None
    except BaseException as error:
        place = of_place(error) if isinstance(error, OSError) else None
        user_error = isinstance(error, UserError) or place is not None
        message = place or (str(error) if user_error else f"{type(error).__name__}: {error}")
        found = {"rank": rank, "time": time.time(), "user_error": user_error, "message": message}
        if isinstance(error, RolledBack):
            found |= {"rolled_back": True, "message": str(error)}
        with contextlib.suppress(OSError):  # the disk is full
            rundir.write_json(run_dir, f"logs/rank{rank}.error.json", found)
            traceback.print_exc()
            sys.stdout.flush()
        # Not sys.exit: peers may be in a collective with us, and tearing down process groups would wait for them.
        os._exit(UserError.exit_code if user_error else 1)


if __name__ == "__main__":
    main()
