"""The background writer's process when its rank is killed."""

import pickle
import subprocess
import sys

import psutil

from posttrain import patches

RANK = """
import multiprocessing, time
from posttrain.patches.correctness.async_writer import die_with_parent

def wait():
    die_with_parent()
    print(multiprocessing.current_process().pid, flush=True)
    time.sleep(600)

if __name__ == "__main__":
    multiprocessing.get_context("spawn").Process(target=wait, daemon=True).start()
    time.sleep(600)
"""


def test_it_dies_with_a_killed_parent(tmp_path):
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    rank = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True)
    writer = psutil.Process(int(rank.stdout.readline()))
    rank.kill()
    rank.wait()
    assert psutil.wait_procs([writer], timeout=60)[0], "the writer outlived its rank"


def test_megatron_starts_it():
    patches.apply(patches.Platform(device="cpu", transformer_engine=False))
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

    from posttrain.patches.correctness import async_writer

    assert PersistentAsyncCaller.async_loop is async_writer.write
    assert pickle.loads(pickle.dumps(PersistentAsyncCaller.async_loop)) is async_writer.write


SERVED = """
import time
from posttrain import patches
patches.apply(patches.Platform(device="cpu", transformer_engine=False))
from megatron.core.dist_checkpointing.strategies.filesystem_async import get_write_results_queue

queue = get_write_results_queue("fork")
queue.put("written")
assert queue.get() == "written" and get_write_results_queue() is queue
print("ready", flush=True)
time.sleep(600)
"""


def test_the_server_of_its_results_dies_with_a_killed_rank():
    rank = subprocess.Popen([sys.executable, "-W", "ignore", "-c", SERVED], stdout=subprocess.PIPE, text=True)
    assert rank.stdout.readline() == "ready\n"
    children = psutil.Process(rank.pid).children(recursive=True)
    assert children
    rank.kill()
    rank.wait()
    assert not psutil.wait_procs(children, timeout=60)[1]
