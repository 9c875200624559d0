"""A rank as a process: how it is started, with which environment, and that it dies with the command."""

import contextlib
import ctypes
import functools
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Protocol

from posttrain.utils.cache import cache_root, check_private, make_private
from posttrain.utils.rank_environment import DEVICE

COPIED_BYTES = 1 << 16  # at a time
PR_SET_PDEATHSIG = 1  # of prctl(2)
# Where each compiler of kernels looks for those that it has compiled.
COMPILERS = {"inductor": "TORCHINDUCTOR_CACHE_DIR", "triton": "TRITON_CACHE_DIR"}


class RankProcess(Protocol):
    """A rank's process, started (subprocess.Popen) or forked (fork_server.ForkedRank).

    Attributes:
        returncode: None: it runs, as far as `poll` has found out.
    """

    returncode: int | None

    @property
    def pid(self) -> int | None:
        """None: there is no process yet."""

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""

    def send_signal(self, sig: int) -> None:
        """Send it a signal, if it runs."""


def start_process(
    arguments: Sequence[str],
    env: Mapping[str, str],
    stdin: int,
    output: int | IO[bytes],
    inherited: Sequence[int],
    dies_with_parent: bool = True,
) -> subprocess.Popen[bytes]:
    """Start a worker in a session of its own: Ctrl-C reaches the command alone, which then decides.

    Args:
        arguments: of posttrain.launch.worker.
        env: its whole environment.
        stdin: subprocess.PIPE or subprocess.DEVNULL.
        output: file for what it prints.
        inherited: descriptors that it keeps.
        dies_with_parent: whether it is killed when this process dies, however it dies.
    """
    parent = os.getpid() if dies_with_parent else None
    return subprocess.Popen(
        [sys.executable, "-m", "posttrain.launch.worker", *arguments],
        env=env,
        stdin=stdin,
        stdout=output,
        stderr=subprocess.STDOUT,
        pass_fds=inherited,
        start_new_session=True,
        preexec_fn=functools.partial(_before_exec, parent),
    )


def _before_exec(parent: int | None) -> None:
    """In the child. Slurm sends a job's signal to every process of it; what it means the command says, by SIGTERM."""
    if parent is not None:
        die_with_parent(parent)
    for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


def die_with_parent(parent: int) -> None:
    """Have this process, a child of `parent`, killed when that dies, however it dies (Linux)."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it has died already
        os.kill(os.getpid(), signal.SIGKILL)


def end_session(leader: int | None) -> None:
    """Kill what a rank, the leader of a session of its own, has left in it: loader workers."""
    if leader is not None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(leader, signal.SIGKILL)


def become_rank(env: Mapping[str, str | None], log: int) -> None:
    """Make this process a rank, which has imported before it was known which.

    Args:
        env: variables to set; None: not to have.
        log: file for what it prints; what it has printed so far, to a file, is copied there.
    """
    for name, value in env.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    sys.stdout.flush()
    copied = 0
    printed = os.pread(1, COPIED_BYTES, copied)
    while printed:
        os.write(log, printed)
        copied += len(printed)
        printed = os.pread(1, COPIED_BYTES, copied)
    null = os.open(os.devnull, os.O_RDONLY)
    for opened, standard in ((null, 0), (log, 1), (log, 2)):
        os.dup2(opened, standard)
    os.close(null)
    os.close(log)


def base_environment(
    gpus: int, local_size: int, deterministic: bool = False, fsdp: bool = False, cores: int | None = None
) -> dict[str, str]:
    """What every rank has in its environment, whichever it is; the user's own values win.

    Args:
        gpus: visible GPUs; 0 means the CPU.
        local_size: ranks on this machine, which share its cores.
        deterministic: as `trainer.deterministic`.
        fsdp: as `parallelism.fsdp`.
        cores: that they may use; None: as many as this process.
    """
    cores = cores or len(os.sched_getaffinity(0))
    defaults = {"TOKENIZERS_PARALLELISM": "true"}
    if gpus:
        if not fsdp:  # which refuses it
            defaults["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"  # Megatron's overlap relies on the order of launches
        defaults["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
        defaults["NCCL_GRAPH_REGISTER"] = "0"  # a captured step's buffers can't be registered in such segments
        defaults["NVTE_FRAMEWORK"] = "pytorch"
        defaults["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # a few kernels; a pool of processes takes longer to start
        if deterministic:  # what torch, Transformer Engine and Megatron ask for
            defaults["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
            defaults["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] = "0"
            defaults["NCCL_ALGO"] = "Ring"
    else:
        defaults["CUDA_VISIBLE_DEVICES"] = ""
        defaults["TORCHDYNAMO_DISABLE"] = "1"  # Megatron's jit_fuser compiles with torch.compile
        defaults["OMP_WAIT_POLICY"] = "PASSIVE"  # waiting threads that spin take the cores from everything else
        defaults["OMP_NUM_THREADS"] = str(max(1, cores // local_size))
    return {
        **defaults,
        **os.environ,
        "PYTHONUNBUFFERED": "1",
        DEVICE: "cuda" if gpus else "cpu",
    }


def kernel_cache(cache_dir: str | None, compiler: str) -> Path:
    """The directory of kernels that were compiled in earlier runs, made for this user alone.

    Args:
        cache_dir: the cache's root; None: the user's, see `posttrain.utils.cache.cache_root`.
        compiler: whose kernels: a key of COMPILERS.

    Raises:
        UserError: others may write to it.
    """
    directory = cache_root(cache_dir) / "kernels" / compiler
    check_private(directory)
    make_private(directory)
    return directory
