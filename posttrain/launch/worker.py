"""One rank of a run: `python -m posttrain.launch.worker RUN_DIR`.

The launcher starts it with torch's environment set. Without RUN_DIR it imports and waits for its orders (prestart.py);
as a fork server it imports, and each of its forks is a rank (fork_server.py).

Reads the frozen configuration, applies the patches this platform needs, instantiates the groups, trains.
"""

import atexit
import contextlib
import faulthandler
import importlib
import json
import logging
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from hydra.utils import instantiate

from posttrain import patches
from posttrain.config import frozen, targets
from posttrain.config.instantiate import built
from posttrain.errors import Pruned, RunFailed, UserError, location_error
from posttrain.launch import fork_server
from posttrain.launch.failure import RankError, error_file
from posttrain.launch.rank_process import become_rank
from posttrain.train.context import Groups
from posttrain.train.rollback import RolledBack
from posttrain.train.startup_clock import StartupClock
from posttrain.utils import boot_clock, rundir
from posttrain.utils.rank_environment import DEVICE, STARTED

if TYPE_CHECKING:
    from posttrain.train.trainer import Trainer

log = logging.getLogger("posttrain")

# What every run imports sooner or later.
USED = (
    "hydra.utils",
    "megatron.bridge.training.finetune",
    "transformers.models.auto.tokenization_auto",
    "posttrain.train.callbacks",
    "posttrain.train.dataset_provider",
    "posttrain.objectives.token_loss",
    "posttrain.ops.fused_lora",
    "posttrain.data",
    "posttrain.train.trainer",
)
# And what it imports when it is under way: to check the base's weights, to save, and to export.
LATER = (
    "pyarrow",
    "posttrain.data.prepare",
    "megatron.bridge.models.conversion.auto_bridge",
    "torch.fx.experimental.symbolic_shapes",
    "transformers.modeling_utils",
    "transformers.models.auto.modeling_auto",
    "peft",
)
GROUPS = (
    "model",
    "peft",
    "objective",
    "data",
    "template",
    "parallelism",
    "optimizer",
    "scheduler",
    "precision",
    "checkpoint",
)
COUNT_BY_NVML = "PYTORCH_NVML_BASED_CUDA_CHECK"  # torch asks NVML whether there are GPUs, so that a fork can use them


def import_all(wake: bool = True) -> patches.Platform:
    """Apply the patches that this platform needs and import what a training run uses.

    Args:
        wake: on a GPU, wake it up meanwhile.

    Returns:
        The platform.
    """
    import torch  # noqa: F401  (before Transformer Engine, which needs torch's NCCL loaded)

    device = os.environ.get(DEVICE, "cpu")
    if device == "cuda" and wake:
        threading.Thread(target=wake_gpu, daemon=True).start()
    platform = patches.Platform.detect(device)
    patches.apply(platform)
    for module in USED:
        importlib.import_module(module)
    return platform


def wake_gpu() -> None:
    """Create the device's context and load cuBLAS while this process imports; both wait for the driver."""
    import torch

    with contextlib.suppress(Exception):  # the same error is raised where the device is used
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        ones = torch.ones(256, 256, dtype=torch.bfloat16, device=device)
        (ones @ ones).sum().item()


def build(run_dir: Path) -> "Trainer":
    """The trainer of the run in `run_dir`, with everything it is composed of."""
    clock = StartupClock(float(os.environ.get(STARTED, boot_clock.now())))
    clock.mark("compose, import" if "posttrain.train.trainer" in sys.modules else "compose, launch")
    cfg = frozen.read(run_dir)
    targets.check(cfg)
    platform = import_all()
    applied = ", ".join(patches.apply(platform))
    log.info("device %s, Transformer Engine %s, patches: %s", platform.device, platform.transformer_engine, applied)

    parts: dict[str, Any] = {}
    for name in GROUPS:
        parts[name] = built(cfg[name]) if cfg[name].get("_target_") else None
    trackers = list(map(built, cfg.logger.values()))
    # Partial: Hydra would turn the instantiated objects among its arguments into configuration again.
    targets.require_own(cfg.trainer)
    trainer = instantiate(cfg.trainer, _partial_=True)
    clock.mark("import")
    groups = Groups(**parts, trackers=trackers)
    return trainer(groups=groups, platform=platform, run_dir=run_dir, frozen=cfg, clock=clock)


def await_orders() -> str | None:
    """Import what every run needs, then wait; the run directory, None where there will be no run."""
    with contextlib.suppress(Exception):  # the same error is raised and reported when the run starts
        import_all()
    line = sys.stdin.readline()
    if not line:
        return None
    orders = json.loads(line)
    become_rank(orders["env"], rundir.append(Path(orders["run_dir"]), orders["log"]))
    return orders["run_dir"]


def fork_ranks(descriptor: int) -> str:
    """Import what every run needs, then fork ranks; returns in each of them, with its run directory.

    Args:
        descriptor: see `fork_server.serve`.
    """
    os.environ[COUNT_BY_NVML] = "1"
    with contextlib.suppress(Exception):  # the same error is raised and reported by each rank
        import_all(wake=False)
        for module in LATER:
            importlib.import_module(module)
    del os.environ[COUNT_BY_NVML]
    return fork_server.serve(descriptor)


def describe(error: BaseException) -> RankError:
    """An error of this rank, for the launcher."""
    location = location_error(error) if isinstance(error, OSError) else None
    description: RankError = {
        "rank": int(os.environ["RANK"]),
        "time": time.time(),
        "user_error": isinstance(error, UserError) or location is not None,
        "message": f"{type(error).__name__}: {error}",
    }
    if location is not None:
        description["message"] = location
    elif isinstance(error, UserError | RolledBack | Pruned):
        description["message"] = str(error)
    if isinstance(error, RolledBack):
        description["rolled_back"] = True
    if isinstance(error, Pruned):
        description["pruned"] = True
    return description


def main() -> int:
    """Train; on an error leave RUN_DIR/logs/rankN.error.json for the launcher. Returns the exit code."""
    match sys.argv[1:]:
        case [fork_server.OPTION, descriptor]:
            location: str | None = fork_ranks(int(descriptor))
        case [directory]:
            location = directory
        case _:
            location = await_orders()
    if location is None:
        return 0
    run_dir = Path(location)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)  # the launcher asks a run that hangs where it is
    try:
        build(run_dir).fit()
    except SystemExit as stop:
        # Megatron leaves the training loop by sys.exit(0) after it has saved on a signal, and elsewhere by sys.exit()
        # or another code when it gives up; a run that is done returns.
        return RunFailed.STOPPED if stop.code == 0 else 1
    except BaseException as error:
        description = describe(error)
        with contextlib.suppress(OSError):  # the disk is full
            rundir.write_json(run_dir, error_file(description["rank"]), description)
            traceback.print_exc()
            sys.stdout.flush()
        # At once: peers may be in a collective with us, and tearing down process groups would wait for them.
        if isinstance(error, Pruned):  # it is saved
            os._exit(RunFailed.STOPPED)
        os._exit(UserError.exit_code if description["user_error"] else 1)
    return 0


def leave(code: int) -> NoReturn:
    """End the process as the interpreter would, but for taking apart all that is loaded, which takes seconds."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    leave(main())
