"""What a peer of bench/peers.py trains, and how its steps are timed.

Imports nothing of posttrain, for peers that have packages of their own.
"""

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

GIB = 2**30


@dataclass(frozen=True)
class Work:
    """What is trained: the same for every peer.

    Attributes:
        architecture: fields of a config.json.
        gpus: processes, each with one.
        seq_length: tokens of a row; all are supervised.
        micro_batch: rows of a forward pass.
        global_batch: rows of a step, over all processes.
        steps: to time, with those of warm-up.
        rank: of LoRA on all linear layers; None: all weights are trained.
        alpha: LoRA's product is multiplied by alpha / rank.
        checkpointing: activations are computed again in the backward pass.
        tensor_parallel: processes that share a layer.
        pipeline_parallel: processes that share the layers.
        tokenizer: directory of one, for a peer that requires it.
        liger: Liger's kernels in place of Transformers' own.
        attention: `attn_implementation` of Transformers.
        experts: LoRA of a mixture is on its experts too; False: on attention alone.
        autocast: adapters in fp32 under autocast, as the Trainer does with bf16=True; False: adapters in bf16.
        cuda_graph: Megatron-Core's graph of each layer.
        block_compile: Unsloth compiles each layer whole, its default.
    """

    architecture: dict[str, Any]
    gpus: int
    seq_length: int
    micro_batch: int
    global_batch: int
    steps: int
    rank: int | None
    alpha: int
    checkpointing: bool
    tensor_parallel: int
    pipeline_parallel: int
    tokenizer: str | None
    liger: bool = False
    attention: str = "sdpa"
    experts: bool = True
    autocast: bool = True
    cuda_graph: bool = False
    block_compile: bool = True

    @property
    def accumulation(self) -> int:
        """Micro-batches of a step on each process."""
        replicas = self.gpus // (self.tensor_parallel * self.pipeline_parallel)
        return self.global_batch // (self.micro_batch * replicas)

    @property
    def tokens(self) -> int:
        """Tokens of a step, over all processes."""
        return self.global_batch * self.seq_length

    @property
    def device(self) -> torch.device:
        """This process's GPU, else the CPU."""
        if torch.cuda.is_available():
            return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        return torch.device("cpu")


class Clock:
    """Times steps; the peak of memory is of these alone.

    Attributes:
        seconds: of each step, until the device has done it.
    """

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._began = 0.0

    def start(self) -> None:
        """Begin a step."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            if not self.seconds:
                torch.cuda.reset_peak_memory_stats()
        self._began = time.perf_counter()

    def stop(self) -> None:
        """End it."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self._began)

    def result(self) -> dict[str, Any]:
        """Seconds of the steps, and this process's memory in GiB where it has a GPU."""
        result: dict[str, Any] = {"seconds": self.seconds}
        if torch.cuda.is_available():
            result["device"] = torch.cuda.get_device_name()
            result["peak_gib"] = torch.cuda.max_memory_allocated() / GIB
            result["reserved_gib"] = torch.cuda.max_memory_reserved() / GIB
        return result


def train_loop(
    work: Work, model: torch.nn.Module, vocabulary: int, before: Callable[[bool], None] | None = None
) -> Clock:
    """Train a model of Transformers' interface on random tokens, by AdamW with gradients clipped to norm 1.

    Args:
        work: what is trained.
        model: gives `.loss` for `input_ids` and `labels`, both [rows, tokens].
        vocabulary: tokens are below it.
        before: called before each micro-batch with whether it is the step's last.
    """
    trained = [parameter for parameter in model.train().parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    shape = (work.micro_batch, work.seq_length)
    clock = Clock()
    for _ in range(work.steps):
        clock.start()
        for number in range(work.accumulation):
            if before:
                before(number == work.accumulation - 1)
            ids = torch.randint(0, vocabulary, shape, device=work.device)
            with torch.autocast(work.device.type, torch.bfloat16, enabled=work.autocast):
                loss = model(input_ids=ids, labels=ids).loss / work.accumulation
            loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        clock.stop()
    return clock


def run(train: Callable[[Work], Clock]) -> None:
    """Do the work in the file that is the command's argument.

    Each process writes `rank<N>.json` beside it: what was measured, or what was raised.
    """
    file = Path(sys.argv[1])
    rank = os.environ["RANK"]
    work = Work(**json.loads(file.read_text()))
    if torch.cuda.is_available():
        torch.cuda.set_device(work.device)
    try:
        result = train(work).result()
    except Exception as error:
        traceback.print_exc()
        result = {"error": f"{type(error).__name__}: {error}"}
    (file.parent / f"rank{rank}.json").write_text(json.dumps(result))
    if "error" in result:
        sys.stdout.flush()
        os._exit(1)  # other ranks may wait for this one, and so would the end of the process group
