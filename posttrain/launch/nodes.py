"""A run on several machines, or under torchrun: which of its processes this command starts, and where its files go.

Machines of a run need a file system in common: each writes its ranks' logs to the run directory, and a checkpoint is
written by all of them. No torch here.
"""

import os
import socket

from omegaconf import DictConfig

from posttrain.errors import UserError

RUN_DIR = "hydra.run.dir"
PORTS = range(10000, 30000)  # below those that Linux gives to outgoing connections


def torchrun() -> bool:
    """Whether torchrun started this process, as one rank of many."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def local_ranks(processes: int) -> list[int]:
    """The ranks of this machine that this command starts: all of them, or torchrun's one.

    Args:
        processes: ranks of the run on this machine.
    """
    if torchrun():
        return [int(os.environ["LOCAL_RANK"])]
    return list(range(processes))


def first(cfg: DictConfig) -> bool:
    """Whether this command starts rank 0, and so keeps the run's status."""
    return cfg.launch.node_rank == 0 and local_ranks(1) == [0]


def adopt(cfg: DictConfig) -> None:
    """Under torchrun, set `cfg` to its machines and processes; else leave it as it is.

    Raises:
        UserError: the configuration asks for another number of processes than torchrun has started.
    """
    if not torchrun():
        return
    local_size = int(os.environ["LOCAL_WORLD_SIZE"])
    if cfg.parallelism.nproc_per_node not in (None, local_size):
        raise UserError(
            f"`parallelism.nproc_per_node={cfg.parallelism.nproc_per_node}`: torchrun has started {local_size} "
            "processes; leave it out"
        )
    cfg.parallelism.nproc_per_node = local_size
    cfg.launch.nnodes = int(os.environ["WORLD_SIZE"]) // local_size
    cfg.launch.node_rank = int(os.environ["RANK"]) // local_size
    cfg.launch.master_addr = os.environ["MASTER_ADDR"]
    cfg.launch.master_port = int(os.environ["MASTER_PORT"])


def agree_on_directory(argv: list[str]) -> list[str]:
    """The command line with a run directory that every rank of torchrun's finds alike; the default has the time in it.

    Raises:
        UserError: a sweep, or torchrun has no id of its own and the command line names no directory.
    """
    if not torchrun():
        return argv
    if {"-m", "--multirun"} & set(argv):
        raise UserError("--multirun: a sweep starts its own processes; leave torchrun out")
    added = []
    if not names_directory(argv):
        run_id = os.environ["TORCHELASTIC_RUN_ID"]
        if run_id == "none":
            raise UserError(f"{RUN_DIR}: give a directory, or torchrun an --rdzv-id: its ranks must use the same one")
        added.append(f"{RUN_DIR}=outputs/torchrun-{run_id}")
    if os.environ["RANK"] != "0":
        added.append("hydra.output_subdir=null")  # Hydra's own record is written once
    return [*argv, *added]


def names_directory(argv: list[str]) -> bool:
    """Whether a command line says where the run's files go."""
    return any(arg.lstrip("+").startswith(f"{RUN_DIR}=") for arg in argv)


def check_directory(cfg: DictConfig, argv: list[str]) -> None:
    """Refuse several machines without a run directory that they can agree on.

    Raises:
        UserError: in that case.
    """
    if cfg.launch.nnodes > 1 and not names_directory(argv):
        raise UserError(f"{RUN_DIR}: with launch.nnodes > 1 give a directory, the same on every machine")


def check_port(cfg: DictConfig) -> None:
    """Refuse a port that another program of this machine listens on; under torchrun it is torchrun that does.

    Raises:
        UserError: in that case.
    """
    port = cfg.launch.master_port
    if port is None or torchrun() or not first(cfg):
        return
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # of an ended run: may be taken again at once
        try:
            probe.bind(("", port))
        except OSError as error:
            raise UserError(f"`launch.master_port={port}`: {error.strerror}; choose another port") from None


def reserve_port() -> socket.socket:
    """A TCP port that the system gives to nobody else while the returned socket is open, and on which a child listens.

    Seconds pass until a rank does. Linux lets it (both have SO_REUSEADDR, this one doesn't listen), and keeps such a
    port from outgoing connections and from those who ask for any port.
    """
    reserved = socket.socket()
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.bind(("", 0))
    return reserved


def port_of_job(job: int) -> int:
    """A port that the machines of a job agree on without talking; jobs that follow each other get different ones."""
    return PORTS[job % len(PORTS)]
