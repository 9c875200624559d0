"""Ranks that others give: torchrun's and Slurm's variables."""

import socket

import pytest

from posttrain.config.composition import compose
from posttrain.errors import UserError
from posttrain.launch import nodes
from posttrain.sweep.job import set_launch

TORCHRUN = {"TORCHELASTIC_RUN_ID": "seven", "RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4",
            "MASTER_ADDR": "a", "MASTER_PORT": "1234"}  # fmt: skip


@pytest.fixture
def torchrun(monkeypatch):
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def test_torchruns_ranks_are_taken_over(torchrun):
    cfg = compose()
    nodes.adopt(cfg)
    launch = cfg.launch
    assert (launch.nnodes, launch.node_rank, launch.master_addr, launch.master_port) == (2, 1, "a", 1234)
    assert cfg.parallelism.nproc_per_node == 4
    assert nodes.local_ranks(4) == [1] and not nodes.first(cfg)
    with pytest.raises(UserError, match="torchrun has started 4"):
        nodes.adopt(compose(["parallelism.nproc_per_node=2"]))


def test_a_directory_for_all_of_torchruns_ranks(torchrun):
    assert nodes.agree_on_directory(["x=1"]) == [
        "x=1",
        "hydra.run.dir=outputs/torchrun-seven",
        "hydra.output_subdir=null",
    ]
    torchrun.setenv("RANK", "0")
    assert nodes.agree_on_directory(["hydra.run.dir=d"]) == ["hydra.run.dir=d"]
    torchrun.setenv("TORCHELASTIC_RUN_ID", "none")
    with pytest.raises(UserError, match="--rdzv-id"):
        nodes.agree_on_directory([])
    with pytest.raises(UserError, match="--multirun"):
        nodes.agree_on_directory(["-m"])


def test_machines_by_hand_need_a_directory_to_agree_on():
    cfg = compose(["launch.nnodes=2", "launch.master_port=1234"])
    with pytest.raises(UserError, match=r"hydra\.run\.dir"):
        nodes.check_directory(cfg, ["launch.nnodes=2"])
    nodes.check_directory(cfg, ["hydra.run.dir=d"])
    assert nodes.first(cfg) and nodes.local_ranks(3) == [0, 1, 2]


def test_slurm_places_a_task():
    cfg = compose()
    set_launch(cfg, {"SLURM_NNODES": "2", "SLURM_NODEID": "1", "SLURM_JOB_ID": "20003"}, "n7")
    assert (cfg.launch.nnodes, cfg.launch.node_rank, cfg.launch.master_addr) == (2, 1, "n7")
    assert cfg.launch.master_port == nodes.port_of_job(20003) != nodes.port_of_job(20004)
    chosen = compose(["launch.master_port=1234"])
    set_launch(chosen, {"SLURM_NNODES": "2", "SLURM_NODEID": "0", "SLURM_JOB_ID": "20003"}, "n7")
    assert chosen.launch.master_port == 1234
    alone = compose()
    set_launch(alone, {"SLURM_NNODES": "1", "SLURM_NODEID": "0", "SLURM_JOB_ID": "20003"}, "n7")
    assert alone.launch.master_port is None  # a free one


def test_a_busy_port_is_refused():
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=rf"launch.master_port={port}.*in use; choose another port"):
            nodes.check_port(compose([f"launch.master_port={port}"]))
        nodes.check_port(compose(["launch.nnodes=2", "launch.node_rank=1", f"launch.master_port={port}"]))
    nodes.check_port(compose([f"launch.master_port={port}"]))
