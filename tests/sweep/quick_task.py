"""`python -m posttrain` with a stand-in for the training: trials that end at once, fail, die or wait, by their seed.

Composition, launcher, processes, files and report are the real ones.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

from hydra.core.hydra_config import HydraConfig

from posttrain.cli import command
from posttrain.errors import RunFailed
from posttrain.launch.launcher import prepare, record_inputs
from posttrain.spec.checks import check
from posttrain.utils.atomic_files import write_json

FAIL, DIE, WAIT, MEET = 1, 2, 3, 4  # seeds


def task(cfg):
    check(cfg, 0)
    run_dir = Path(HydraConfig.get().runtime.output_dir)
    prepare(cfg, run_dir)
    record_inputs(cfg, run_dir)
    with open(run_dir / "runs.log", "a") as log:
        log.write(json.dumps({"time": time.time(), "cores": sorted(os.sched_getaffinity(0))}) + "\n")
    started = time.time()
    write_json(run_dir / "status.json", {"state": "running", "started": started})
    print("a line of the trial's own")
    if cfg.seed == FAIL:
        write_json(run_dir / "status.json", {"state": "failed", "error": "loss is NaN"})
        raise RunFailed("loss is NaN")
    if cfg.seed == DIE:
        os.kill(os.getpid(), signal.SIGKILL)
    waited = run_dir.parent / "waited"
    if cfg.seed == WAIT and not waited.exists():  # the first of a sweep alone
        waited.touch()
        try:
            time.sleep(60)
        except KeyboardInterrupt:
            write_json(run_dir / "status.json", {"state": "stopped", "error": "interrupted"})
            raise
    if cfg.seed == MEET:  # ends only if another trial runs at the same time
        deadline = time.time() + 60
        while len(list(run_dir.parent.glob("*/runs.log"))) < 2:
            if time.time() > deadline:
                raise RunFailed("alone")
            time.sleep(0.02)
    loss = abs(cfg.optimizer.lr - 3e-4) * 1e4 + 1 / cfg.peft.rank
    write_json(run_dir / "summary.json", {"val_loss_after": loss, "train_loss": loss})
    write_json(run_dir / "status.json", {"state": "finished", "started": started})
    (run_dir / "adapter").mkdir(exist_ok=True)
    return loss


if __name__ == "__main__":
    sys.argv[0] = "posttrain"
    command.run(task)
