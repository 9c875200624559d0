"""`trainer.profile=true`: where a training step's time goes, as a trace and a short table."""

import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from posttrain.files import write_json

WARMUP, STEPS = 4, 3  # steps before the measured ones, and those
# First match wins; the names are CUDA kernels' on a GPU and operators' on a CPU.
CATEGORIES = (
    ("communication", r"nccl|AllReduce|AllGather|ReduceScatter|SendRecv|c10d|gloo"),
    ("attention", r"flash|fmha|attention|sdpa|softmax.*(mask|scale)|rope|rotary"),
    ("cross entropy", r"cross_entropy|softmax|nll"),
    ("matrix products", r"gemm|cutlass|wgmma|nvjet|cublas|xmma|^aten::(mm|addmm|bmm|linear|matmul)$|splitK"),
    ("optimizer", r"multi_tensor|adam|foreach"),
    ("norms", r"norm|Norm"),
    ("copies and casts", r"[Mm]emcpy|[Mm]emset|copy_|cast|transpose|_to_copy"),
)


class Profile:
    """Watches the steps after a warm-up.

    Args:
        run_dir: trace.json.gz and profile.json are written there.
        device: "cpu" or "cuda".
    """

    def __init__(self, run_dir: Path, device: str) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if device == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self.run_dir, self.device, self.table = run_dir, device, None
        self.profiler = torch.profiler.profile(
            activities=activities,
            schedule=torch.profiler.schedule(wait=WARMUP - 1, warmup=1, active=STEPS, repeat=1),
            on_trace_ready=self.write,
            acc_events=True,
        )
        self.profiler.start()

    def step(self) -> None:
        """A training step has ended."""
        self.profiler.step()

    def write(self, profiler: Any) -> None:
        """Write the trace and the table."""
        profiler.export_chrome_trace(str(self.run_dir / "trace.json.gz"))
        self.table = self.summarise(profiler)
        write_json(self.run_dir / "profile.json", self.table)

    def summarise(self, profiler: Any) -> dict[str, Any]:
        """Milliseconds per step by category; on a GPU also the time no kernel ran, and the costliest kernels."""
        on_gpu = self.device == "cuda"
        times: dict[str, float] = defaultdict(float)
        kernels: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
        spans: list[tuple[float, float]] = []
        for event in profiler.events():
            if on_gpu != (event.device_type == torch.autograd.DeviceType.CUDA):
                continue
            if on_gpu and event.name.startswith(("ProfilerStep", "gpu_user_annotation", "nccl:")):
                continue
            spent = event.time_range.elapsed_us() if on_gpu else event.self_cpu_time_total
            category = next(
                (name for name, pattern in CATEGORIES if re.search(pattern, event.name)), "elementwise, other"
            )
            times[category] += spent / 1000 / STEPS
            kernels[event.name][0] += spent / 1000 / STEPS
            kernels[event.name][1] += 1
            if on_gpu:
                spans.append((event.time_range.start, event.time_range.end))
        table: dict[str, Any] = {"milliseconds_per_step": dict(sorted(times.items(), key=lambda item: -item[1]))}
        if spans:
            spans.sort()
            busy, end = 0.0, spans[0][0]
            for start, stop in spans:
                busy += max(0.0, stop - max(start, end))
                end = max(end, stop)
            whole = end - spans[0][0]
            table["milliseconds_per_step"]["idle"] = (whole - busy) / 1000 / STEPS
            table["step_milliseconds"] = whole / 1000 / STEPS
        top = sorted(kernels.items(), key=lambda item: -item[1][0])[:25]
        table["costliest"] = [
            {"name": name[:120], "milliseconds": round(ms, 3), "calls": count // STEPS} for name, (ms, count) in top
        ]
        return table
