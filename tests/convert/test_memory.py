"""A conversion's memory: the weights are in mapped files, not in the process."""

import ctypes
import gc
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest

from posttrain.models import HFModel

PARTS = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 18, "num_attention_heads": 8}
WEIGHTS, MOST = 250e6, 100e6  # bytes of the fp32 model, at least; of the process's own memory that converting adds


@contextmanager
def own_memory():
    """Yield a list of the process's own memory (bytes, without mapped files), sampled every 2 ms."""

    def sample() -> None:
        while not done.wait(0.002):
            status = Path("/proc/self/status").read_text()
            found.append(1024 * int(status.partition("RssAnon:")[2].split()[0]))

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # or what is free counts as used
    found, done = [], threading.Event()
    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()


@pytest.fixture
def large(base):
    directory = base("llama", **PARTS)
    assert (directory / "model.safetensors").stat().st_size > WEIGHTS
    return directory


def test_weights_are_not_in_the_process(megatron, large, base, tmp_path, monkeypatch):
    from posttrain.convert import shards
    from posttrain.convert.checkpoints import find
    from posttrain.convert.megatron import export_checkpoint, import_model

    monkeypatch.setattr(shards.ShardWriter.__init__, "__defaults__", (50_000_000,))  # what a shard takes is its own
    with own_memory() as memory:
        import_model(HFModel(path=str(large)), tmp_path / "megatron")
    assert max(memory) - memory[0] < MOST
    with own_memory() as memory:
        export_checkpoint(find(tmp_path / "megatron"), tmp_path / "hf")
    assert max(memory) - memory[0] < MOST
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 4
