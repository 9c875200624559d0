"""The words for a GPU whose memory is full: pure functions of torch's statistics and the run's settings."""

from dataclasses import replace

import pytest
import torch

from posttrain.config.composition import compose
from posttrain.plan.memory import GIB, estimate_memory
from posttrain.spec.resolve import resolve_spec
from posttrain.train import out_of_memory
from posttrain.utils.gpus import Gpu, visible_gpus

ERROR = "CUDA out of memory. Tried to allocate 3.91 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.2 GiB is"
SIZES = {"allocated_bytes.all.current": 70, "allocated_bytes.all.peak": 75, "reserved_bytes.all.current": 78}
STATS = {name: gib * GIB for name, gib in SIZES.items()}


def setting(*words):
    return resolve_spec(compose(["model=llama3_8b", *words]), 1)


def said(run, gib=79.1, held=None):
    held = {"weights": 15 * GIB, "gradients": 30 * GIB, "optimizer": 5 * GIB} if held is None else held
    return out_of_memory.message(ERROR, STATS, int(gib * GIB), held, run, Gpu("some", None, gib))


def test_what_has_the_memory():
    text = said(setting())
    assert "Tried to allocate 3.91 GiB" in text and "total capacity" not in text
    assert "allocated 70.0 GiB of 79.1 GiB (weights 15.0 GiB, gradients 30.0 GiB, optimizer 5.0 GiB, " in text
    assert "activations and buffers 20.0 GiB)" in text and "held free in blocks 8.0 GiB" in text


def test_three_settings_with_numbers():
    run = setting("trainer.micro_batch_size=16", "trainer.global_batch_size=64", "trainer.seq_length=4096")
    gpu = Gpu("some", None, estimate_memory(run).needed / GIB - 1)
    chosen = out_of_memory.best(out_of_memory.changes(run, gpu), estimate_memory(run).needed, gpu)
    names = [change.overrides[0].partition("=")[0] for change in chosen]
    assert len(names) == 3 == len(set(names)) and "trainer.micro_batch_size" in names and "trainer.recompute" in names
    text = said(run, gpu.memory_gib)
    for change in chosen:
        numbers = f"{estimate_memory(run).needed / GIB:.1f} GiB -> {change.memory.needed / GIB:.1f} GiB"
        line = next(line for line in text.splitlines() if " ".join(change.overrides) in line)
        assert numbers in line and (", fits" in line) == change.fits(gpu)
    assert chosen[0].fits(gpu)


def test_where_no_single_change_is_enough():
    run = setting("trainer.micro_batch_size=16", "trainer.global_batch_size=64", "trainer.seq_length=4096")
    text = said(run, gib=18)
    assert ", fits" not in text and "does not fit by itself" in text
    assert "none of these alone fits; together: trainer." in text


def test_without_the_models_sizes():
    text = said(None, held={})
    assert "activations and buffers 70.0 GiB" in text and "trainer.recompute=full" in text


def test_nothing_left_to_change():
    small = replace(setting(), micro_batch=1, recompute="full", length=512)
    assert "the GPU's memory is full" in said(small, gib=8)


def test_tensors_on_a_cpu_are_not_on_the_gpu():
    model = torch.nn.Linear(2, 2)
    assert out_of_memory.held([model], None) == {"weights": 0, "gradients": 0, "optimizer": 0}


@pytest.mark.gpu
def test_each_storage_counts_once():
    if not visible_gpus():
        pytest.skip("no GPU")
    model = torch.nn.Linear(1024, 1024, bias=False).cuda()
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 1024, device="cuda")).sum().backward()
    optimizer.step()
    wrapped = type("Part", (), {"optimizer": optimizer})()
    held = out_of_memory.held([model], wrapped)
    assert held["weights"] == held["gradients"] == 4 << 20 and 8 << 20 <= held["optimizer"] < (8 << 20) + 4096
