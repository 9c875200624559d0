"""`trainer.profile=true`: where a training step's time goes, as a trace and a short table."""

import re
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch._C._autograd import DeviceType

from posttrain.utils import rundir

if TYPE_CHECKING:
    from torch.autograd.profiler_util import FunctionEvent

WARMUP = 4  # steps before the measured ones
STEPS = 3  # measured steps
MOST_KERNELS = 25  # in the table
# First match wins; the names are CUDA kernels' on a GPU and operators' on a CPU.
CATEGORIES = (
    ("communication", r"nccl|AllReduce|AllGather|ReduceScatter|SendRecv|c10d|gloo"),
    ("attention", r"flash|fmha|attention|sdpa|softmax.*(mask|scale)|rope|rotary"),
    ("cross entropy", r"cross_entropy|softmax|nll"),
    (
        "matrix products",
        r"gemm|cutlass|wgmma|nvjet|cublas|xmma|^aten::(mm|addmm|bmm|linear|matmul)$|splitK",
    ),
    ("optimizer", r"multi_tensor|adam|foreach"),
    ("norms", r"norm|Norm"),
    ("copies and casts", r"[Mm]emcpy|[Mm]emset|copy_|cast|transpose|_to_copy"),
)


class Profile:
    """Profiles the steps after a warm-up.

    Args:
        run_dir: trace.json.gz and profile.json are written there.
        device: "cpu" or "cuda".
    """

    def __init__(self, run_dir: Path, device: str) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if device == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self.run_dir = run_dir
        self.device = device
        self.table: dict[str, Any] | None = None
        self.profiler = torch.profiler.profile(
            activities=activities,
            schedule=torch.profiler.schedule(wait=WARMUP - 1, warmup=1, active=STEPS, repeat=1),
            on_trace_ready=self.write,
            acc_events=True,
        )
        self.profiler.start()

    def step(self) -> None:
        """Note the end of a training step."""
        self.profiler.step()

    def write(self, profiler: torch.profiler.profile) -> None:
        """Write the trace and the table."""
        rundir.remove(self.run_dir, "trace.json.gz")  # the profiler would write through a link
        profiler.export_chrome_trace(str(self.run_dir / "trace.json.gz"))
        self.table = self.summarise(profiler)
        rundir.write_json(self.run_dir, "profile.json", self.table)

    def summarise(self, profiler: torch.profiler.profile) -> dict[str, Any]:
        """Return milliseconds per step by category, and the costliest kernels.

        On a GPU also the time in which no kernel ran.
        """
        on_gpu = self.device == "cuda"
        times: dict[str, float] = defaultdict(float)
        kernels: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
        spans: list[tuple[float, float]] = []
        for event in profiler.events():
            if not self._counts(event):
                continue
            spent = event.time_range.elapsed_us() if on_gpu else event.self_cpu_time_total
            milliseconds = spent / 1000 / STEPS
            times[categorise(event.name)] += milliseconds
            kernels[event.name][0] += milliseconds
            kernels[event.name][1] += 1
            if on_gpu:
                spans.append((event.time_range.start, event.time_range.end))
        by_time = dict(sorted(times.items(), key=lambda item: -item[1]))
        table: dict[str, Any] = {"milliseconds_per_step": by_time}
        if spans:
            whole, busy = measure_spans(spans)
            by_time["idle"] = (whole - busy) / 1000 / STEPS
            table["step_milliseconds"] = whole / 1000 / STEPS
        table["costliest"] = []
        costliest = sorted(kernels.items(), key=lambda item: -item[1][0])
        for name, (milliseconds, count) in costliest[:MOST_KERNELS]:
            kernel = {
                "name": name[:120],
                "milliseconds": round(milliseconds, 3),
                "calls": count // STEPS,
            }
            table["costliest"].append(kernel)
        return table

    def _counts(self, event: "FunctionEvent") -> bool:
        """Whether an event is a kernel on the GPU, or, without one, an operator on the CPU."""
        on_gpu = event.device_type == DeviceType.CUDA
        if self.device != "cuda":
            return not on_gpu
        return on_gpu and not event.name.startswith(("ProfilerStep", "gpu_user_annotation", "nccl:"))


def categorise(name: str) -> str:
    """Return the category of a kernel or operator."""
    for category, pattern in CATEGORIES:
        if re.search(pattern, name):
            return category
    return "elementwise, other"


def measure_spans(spans: list[tuple[float, float]]) -> tuple[float, float]:
    """Return the time from the first start to the last end, and how much of it is covered."""
    spans = sorted(spans)
    first_start = end = spans[0][0]
    busy = 0.0
    for start, stop in spans:
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return end - first_start, busy
