"""SIGKILL inside Megatron's own writer of shards: the save before or this one is there, whole, and loads.

A real save of a tiny Llama, in a forked process that kills itself before its n-th call that may touch a file, in
whichever thread. A program of its own: only a process without threads and process groups can be forked safely.

    python kill_points.py MODEL_DIR WORK_DIR POINTS    (POINTS: how many, evenly over the save; `all`: some thousands)
"""

import json
import os
import shutil
import signal
import sys
import threading
from pathlib import Path

from test_checkpoint_files import CALLS, child

from posttrain import patches
from posttrain.checkpoint import directories
from posttrain.convert import single_process
from posttrain.models import HFModel

CALLS = CALLS | {"dump", "dumps", "save", "truncate", "write_record", "write_end_of_file"}


class Saver:
    """save(root, step): the real writer, then seal, publish and prune. The weights are `step` throughout."""

    def __init__(self, model: Path):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
        patches.apply(patches.Platform(device="cpu", transformer_engine=False))
        import torch
        from megatron.bridge.training import checkpointing  # noqa: F401  (here once, not in each process)
        from megatron.core import dist_checkpointing  # noqa: F401

        torch.set_num_threads(1)
        self._bridge = HFModel(path=str(model)).bridge()

    def prepare(self, root: Path, step: int, keep: int = 2):
        """A function that saves a model at `step` under `root`."""
        import torch

        from posttrain.models.local_spec import use_local_layers

        provider = self._bridge.to_megatron_provider(load_weights=False)
        use_local_layers(provider)
        provider.use_cpu_initialization, provider.params_dtype = True, torch.float32
        provider.bf16 = provider.fp16 = False
        provider.finalize()
        parts = provider.provide_distributed_model(wrap_with_ddp=False, use_cpu_initialization=True)
        with torch.no_grad():
            for parameter in parts[0].parameters():
                parameter.fill_(step)
        partial = root / directories.PARTIAL

        def write():
            self._bridge.save_megatron_model(parts, partial)
            os.rename(partial / "iter_0000000", directories.directory(partial, step))
            directories.prune(directories.finish(root, step), keep, set())

        return write


def forked(action) -> int:
    """The wait status of `action` in a forked process with a process group of its own."""

    def run():
        single_process.start()
        action()

    return child(run)


def loaded(checkpoint: Path) -> None:
    """Fails unless every tensor of a checkpoint has the value of its step."""
    from megatron.core import dist_checkpointing

    state = dist_checkpointing.load_plain_tensors(str(checkpoint))
    weights = [value for name, value in state.items() if name.startswith(("decoder", "embedding", "output_layer"))]
    assert len(weights) > 5 and all((value == directories.step_of(checkpoint)).all() for value in weights)


def counting(action, before) -> int:
    """Run `action` with `before(n)` called before its n-th call of CALLS in any thread; returns how many there were."""
    seen = [0]

    def watch(frame, event, function):
        if event == "c_call" and getattr(function, "__name__", "") in CALLS:
            seen[0] += 1
            before(seen[0])

    threading.setprofile(watch)
    sys.setprofile(watch)
    try:
        action()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return seen[0]


def main(model: Path, work: Path, points: str) -> dict:
    """Kill one save after another; returns how many calls a save makes and which save was found how often."""
    saver = Saver(model)

    def prepared():
        for step in (2, 4):
            saver.prepare(work / "template", step)()
        shutil.copytree(work / "template", work / "count")
        calls = counting(saver.prepare(work / "count", 6), lambda _: None)
        (work / "calls").write_text(str(calls))
        loaded(directories.directory(work / "count", 6))

    (work / "template").mkdir()
    assert forked(prepared) == 0
    calls = int((work / "calls").read_text())
    wanted = calls if points == "all" else int(points)
    ended = {"calls": calls, "before": 0, "after": 0}
    for point in sorted({1 + round(i * (calls - 1) / (wanted - 1)) for i in range(wanted)}):
        root = work / str(point)
        shutil.copytree(work / "template", root)

        def killed(root=root, point=point):
            write = saver.prepare(root, 6)
            counting(write, lambda number: number == point and os.kill(os.getpid(), signal.SIGKILL))

        status = forked(killed)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (point, status)
        found, skipped = directories.newest(root, hashes=True)
        assert found in (directories.directory(root, 4), directories.directory(root, 6)) and not skipped, point
        ended["after" if directories.step_of(found) == 6 else "before"] += 1

        def go_on(root=root, found=found):
            loaded(found)
            directories.clean(root)
            saver.prepare(root, 8)()
            newest, damaged = directories.newest(root, hashes=True)
            assert newest == directories.directory(root, 8) and not damaged and not list(root.glob(".*"))
            loaded(newest)

        assert forked(go_on) == 0, point
        shutil.rmtree(root)
    return ended


if __name__ == "__main__":
    ended = main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
    (Path(sys.argv[2]) / "ended.json").write_text(json.dumps(ended))
