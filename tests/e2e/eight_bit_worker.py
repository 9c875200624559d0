"""One rank of runs with `precision=fp8`, one after the other: `eight_bit_worker.py FILE RANK WORLD`.

FILE lists the runs: for each its directory, its overrides, a port. The command refuses 8 bits where no GPU has products
of them; here a CPU's stand for those, and everything else is a run's. Writes RUN/held-RANK.json: the bytes of the
base's matrices that this process holds before they are divided, if they are, and when the training has ended. An
earlier run's may be among them.
"""

import gc
import json
import os
import sys
import time
import traceback
from pathlib import Path


def held_bytes() -> int:
    """Bytes of memory of every parameter of this process that is a matrix in 8 bits, whole or a shard."""
    import torch
    from torch.distributed.tensor import DTensor

    from posttrain.models.fully_sharded import is_in_eight_bits

    gc.collect()
    held = 0
    for found in gc.get_objects():
        if not (isinstance(found, torch.nn.Parameter) and is_in_eight_bits(found)):
            continue
        if isinstance(found, DTensor):  # a part of a row of numbers, of which frozen norms are others
            held += found.to_local().nbytes
        else:
            held += found.untyped_storage().nbytes()
    return held


def main() -> None:
    """Run all of them."""
    file, rank, world = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "TORCHDYNAMO_DISABLE": "1", "POSTTRAIN_DEVICE": "cpu"}
    from posttrain import patches

    patches.apply(patches.Platform.detect("cpu"))
    import torch

    from posttrain.config.composition import compose
    from posttrain.launch.launcher import prepare
    from posttrain.launch.worker import build
    from posttrain.models.fully_sharded import put_shards_back
    from posttrain.train import megatron_config
    from posttrain.train.callbacks import RunCallback
    from posttrain.train.precision import Precision
    from posttrain.utils.gpus import Gpu

    torch.set_num_threads(1)
    Precision.resolve = lambda self, device: self.name
    Gpu.check_eight_bit = lambda self, grouped: None
    held: dict[str, int] = {}
    leave_empty, train_end = megatron_config.leave_empty, RunCallback.on_train_end

    def before(parts) -> None:
        held["before"] = held_bytes()
        leave_empty(parts)

    def after(self, context) -> None:
        put_shards_back(context.model)
        held["after"] = held_bytes()
        train_end(self, context)

    megatron_config.leave_empty = before
    RunCallback.on_train_end = after
    for number, run in enumerate(json.loads(file.read_text(encoding="utf-8"))):
        run_dir, prepared = Path(run["directory"]), file.with_suffix(f".{number}")
        if rank == "0":
            prepare(compose(run["overrides"]), run_dir)
            prepared.touch()
        while not prepared.exists():
            time.sleep(0.05)
        os.environ["MASTER_PORT"] = str(run["port"])
        held.clear()
        trainer = build(run_dir)
        trainer.fit()
        del trainer
        (run_dir / f"held-{rank}.json").write_text(json.dumps(held), encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except BaseException:
        traceback.print_exc()
        sys.stdout.flush()
        os._exit(1)  # the others are in a collective with this one: no clean goodbye
