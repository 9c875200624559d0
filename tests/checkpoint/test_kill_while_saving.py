"""SIGKILL inside Megatron's own writer of shards: the save before or this one is there, whole, and loads.

A real save of a tiny Llama, in a forked process that kills itself before its n-th call that may touch a file, in
whichever thread. The points are spread evenly over the save: POSTTRAIN_KILL_POINTS of them (40; `all`: some thousands).
"""

import os
import shutil
import signal
import sys
import threading

import pytest
from test_checkpoint_files import CALLS, child, memory  # noqa: F401  (memory: a fixture)

from posttrain.checkpoint import files

POINTS = os.environ.get("POSTTRAIN_KILL_POINTS", "40")
CALLS = CALLS | {"dump", "dumps", "save", "truncate", "write_record", "write_end_of_file"}


@pytest.fixture(scope="module")
def saver(tmp_path_factory):
    """save(root, step, keep): the real writer, then seal, publish and prune. The weights are `step` throughout.

    Here Megatron is imported only: a process group's threads don't survive a fork, so each forked process has its own.
    """
    from posttrain import patches

    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    patches.apply(patches.Platform(device="cpu", transformer_engine=False))
    import torch
    from families import save_random
    from megatron.bridge.training import checkpointing  # noqa: F401  (not in each process)
    from megatron.core import dist_checkpointing  # noqa: F401

    from posttrain.convert import process
    from posttrain.models import HFModel
    from posttrain.models.local import use_local_layers

    torch.set_num_threads(1)
    directory = tmp_path_factory.mktemp("model")
    save_random("llama", directory)
    bridge = HFModel(path=str(directory)).bridge()

    def save(root, step, keep=2):
        provider = bridge.to_megatron_provider(load_weights=False)
        use_local_layers(provider)
        provider.use_cpu_initialization, provider.params_dtype = True, torch.float32
        provider.bf16 = provider.fp16 = False
        provider.finalize()
        parts = provider.provide_distributed_model(wrap_with_ddp=False, use_cpu_initialization=True)
        with torch.no_grad():
            for parameter in parts[0].parameters():
                parameter.fill_(step)
        partial = root / files.PARTIAL

        def write():
            bridge.save_megatron_model(parts, partial)
            os.rename(partial / "iter_0000000", files.directory(partial, step))
            files.finish(root, step, keep)

        return write

    def forked(action):
        def run():
            process.start()
            action()

        return child(run)

    save.forked = forked
    return save


def loaded(checkpoint):
    """Fails unless every tensor of a checkpoint has the value of its step."""
    from megatron.core import dist_checkpointing

    state = dist_checkpointing.load_plain_tensors(str(checkpoint))
    weights = [value for name, value in state.items() if name.startswith(("decoder", "embedding", "output_layer"))]
    assert len(weights) > 5 and all((value == files.step_of(checkpoint)).all() for value in weights)


def counting(action, before):
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


def test_kill_while_megatron_writes(saver, memory, record_property):  # noqa: F811
    def prepared():
        for step in (2, 4):
            saver(memory / "template", step)()
        shutil.copytree(memory / "template", memory / "count")
        calls = counting(saver(memory / "count", 6), lambda _: None)
        (memory / "calls").write_text(str(calls))
        loaded(files.directory(memory / "count", 6))

    (memory / "template").mkdir()
    assert saver.forked(prepared) == 0
    calls = int((memory / "calls").read_text())
    assert calls > 300
    wanted = calls if POINTS == "all" else int(POINTS)
    ended = {"before": 0, "after": 0}
    for point in sorted({1 + round(i * (calls - 1) / (wanted - 1)) for i in range(wanted)}):
        root = memory / str(point)
        shutil.copytree(memory / "template", root)

        def killed(root=root, point=point):
            write = saver(root, 6)
            counting(write, lambda number: number == point and os.kill(os.getpid(), signal.SIGKILL))

        status = saver.forked(killed)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (point, status)
        found, skipped = files.newest(root, hashes=True)
        assert found in (files.directory(root, 4), files.directory(root, 6)) and not skipped, point
        ended["after" if files.step_of(found) == 6 else "before"] += 1

        def go_on(root=root, found=found):
            loaded(found)
            files.clean(root)
            saver(root, 8)()
            newest, damaged = files.newest(root, hashes=True)
            assert newest == files.directory(root, 8) and not damaged and not list(root.glob(".*"))
            loaded(newest)

        assert saver.forked(go_on) == 0, point
        shutil.rmtree(root)
    record_property("kill_points", sum(ended.values()))
    print(f"\n{sum(ended.values())} kill points of {calls} calls, all recovered: {ended}")
    assert ended["before"] and ended["after"]
