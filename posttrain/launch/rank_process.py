"""A rank as a process: how it is started, with which environment, and that it dies with the command."""

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from posttrain.utils.cache import cache_root, check_private, make_private
from posttrain.utils.rank_environment import DEVICE


def start_process(
    arguments: Sequence[str], env: dict[str, str], stdin: int, output: int | IO[bytes], inherited: Sequence[int]
) -> subprocess.Popen[bytes]:
    """Start a worker in a session of its own: Ctrl-C reaches the command alone, which then decides.

    Args:
        arguments: of posttrain.launch.worker.
        env: its whole environment.
        stdin: subprocess.PIPE or subprocess.DEVNULL.
        output: file for what it prints.
        inherited: descriptors that it keeps.
    """
    return subprocess.Popen(
        [sys.executable, "-m", "posttrain.launch.worker", *arguments],
        env=env,
        stdin=stdin,
        stdout=output,
        stderr=subprocess.STDOUT,
        pass_fds=inherited,
        start_new_session=True,
        preexec_fn=_die_with_parent,
    )


def _die_with_parent() -> None:
    """In the child, before exec: be killed when this process dies, however it dies (Linux PR_SET_PDEATHSIG).

    Slurm sends a job's signal to every process of it. What it means to a rank is the command's to say, by SIGTERM.
    """
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


def base_environment(gpus: int, local_size: int, deterministic: bool = False, fsdp: bool = False) -> dict[str, str]:
    """What every rank has in its environment, whichever it is; the user's own values win.

    Args:
        gpus: visible GPUs; 0 means the CPU.
        local_size: ranks on this machine, which share its cores.
        deterministic: as `trainer.deterministic`.
        fsdp: as `parallelism.fsdp`.
    """
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
        defaults["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // local_size))
    return {
        **defaults,
        **os.environ,
        "PYTHONUNBUFFERED": "1",
        DEVICE: "cuda" if gpus else "cpu",
    }


def kernel_cache(cache_dir: str | None) -> Path:
    """The directory of kernels that were compiled in earlier runs, made for this user alone.

    Args:
        cache_dir: the cache's root; None: the user's, see `posttrain.utils.cache.cache_root`.

    Raises:
        UserError: others may write to it.
    """
    directory = cache_root(cache_dir) / "kernels" / "inductor"
    check_private(directory)
    make_private(directory)
    return directory
