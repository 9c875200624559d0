"""`python -m posttrain.doctor`: what this machine has, what is missing, and what that costs.

Exit code 0: a run works here; 1: it doesn't. `--json` prints the same for scripts.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.table import Table

from posttrain import patches
from posttrain.errors import UserError
from posttrain.patches.elsewhere import CHANGES
from posttrain.patches.registry import allowed_untested
from posttrain.patches.runner import registered
from posttrain.utils import stop
from posttrain.utils.cache import cache_root
from posttrain.utils.consoles import Console
from posttrain.utils.gpus import Gpu, visible_gpus

# What the tests ran with; another version may work.
TESTED = {
    "torch": "2.11.0",
    "megatron-core": "0.19.2",
    "megatron-bridge": "0.6.2",
    "transformers": "5.12.1",
    "hydra-core": "1.3.8",
    "omegaconf": "2.3.1",
}
TESTED_TRANSFORMER_ENGINE = "2.18.0"
REQUIRED_DISK_GIB = 5.0
REQUIRED_SHM_GIB = 1.0
COLORS = {"ok": "green", "note": "yellow", "bad": "red"}


@dataclass
class Finding:
    """One line of the report.

    Attributes:
        name: of what was examined.
        state: ok, note (works, but something is lost) or bad (a run fails).
        text: the result.
        advice: what a note or bad costs, and how to fix it.
    """

    name: str
    state: str
    text: str
    advice: str = ""


def examine() -> Iterator[Finding]:
    """Examine everything, cheapest first."""
    yield check_python()
    yield from check_packages()
    yield from check_gpus()
    yield check_transformer_engine()
    yield check_slurm()
    yield check_disk("disk, outputs", Path.cwd())
    yield check_disk("disk, cache", cache_root())
    if Path("/dev/shm").is_dir():
        yield check_shared_memory()
    yield from list_changes()


def check_python() -> Finding:
    """Megatron-Bridge 0.6 has wheels for one Python."""
    version = platform.python_version()
    if sys.version_info[:2] == (3, 12):
        return Finding("Python", "ok", version)
    return Finding("Python", "bad", version, "Megatron-Bridge 0.6 requires Python 3.12")


def check_packages() -> Iterator[Finding]:
    """Compare the installed versions with the tested ones."""
    for name, tested in TESTED.items():
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            advice = f"install the project with uv; tested: {tested}"
            yield Finding(name, "bad", "not installed", advice)
            continue
        if version.split("+")[0] == tested:
            yield Finding(name, "ok", version)
        else:
            yield Finding(name, "note", version, f"tested: {tested}")


def check_gpus() -> Iterator[Finding]:
    """Driver, CUDA and NCCL as torch sees them."""
    count = visible_gpus()
    if not count:
        advice = "runs use the CPU in fp32: for small models and tests"
        yield Finding("GPU", "note", "none visible", advice)
        return
    import torch

    if not torch.cuda.is_available():
        advice = "torch's CUDA build and the driver don't match"
        yield Finding("GPU", "bad", f"{count} visible, none usable", advice)
        return
    count = torch.cuda.device_count()
    names = sorted({torch.cuda.get_device_name(index) for index in range(count)})
    yield Finding("GPU", "ok", f"{count} x {', '.join(names)}")
    oldest = min(range(count), key=torch.cuda.get_device_capability)
    capability = torch.cuda.get_device_capability(oldest)
    yield check_eight_bit(Gpu(torch.cuda.get_device_name(oldest), None, 0.0, capability=capability))
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    cuda = f"{torch.version.cuda}, driver {driver_version() or 'unknown'}, NCCL {nccl}"
    yield Finding("CUDA", "ok", cuda)


def check_eight_bit(gpu: Gpu) -> Finding:
    """Whether `precision=fp8` is for this GPU."""
    name = "8-bit products"
    for grouped, text in ((False, "none"), (True, "of dense layers, not of experts")):
        try:
            gpu.check_eight_bit(grouped)
        except UserError as error:
            return Finding(name, "note", text, str(error))
    return Finding(name, "ok", "precision=fp8")


def driver_version() -> str | None:
    """The version of the NVIDIA driver, if nvidia-smi is there to ask."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    versions = subprocess.run(query, capture_output=True, text=True).stdout.split()
    return versions[0] if versions else None


def check_transformer_engine() -> Finding:
    """Layers, fused attention, fp8, context parallelism and CUDA graphs depend on it."""
    name = "Transformer Engine"
    if importlib.util.find_spec("transformer_engine") is None:
        advice = (
            "no fp8, context parallelism or CUDA graphs, slower layers; on a GPU: uv sync --extra gpu (requires nvcc)"
        )
        return Finding(name, "note", "not installed", advice)
    version = importlib.metadata.version("transformer-engine")
    if version == TESTED_TRANSFORMER_ENGINE:
        return Finding(name, "ok", version)
    return Finding(name, "note", version, f"tested: {TESTED_TRANSFORMER_ENGINE}")


def check_slurm() -> Finding:
    """Whether jobs can be submitted from here."""
    if shutil.which("sbatch") is None:
        advice = "hydra/launcher=slurm requires it; everything else works"
        return Finding("Slurm", "note", "sbatch not found", advice)
    done = subprocess.run(["sbatch", "--version"], capture_output=True, text=True)
    if done.returncode:
        errors = done.stderr.strip().splitlines() or ["is slurm.conf in place?"]
        return Finding("Slurm", "note", "sbatch does not answer", errors[-1])
    return Finding("Slurm", "ok", done.stdout.strip())


def check_disk(name: str, folder: Path) -> Finding:
    """Free space where `folder` is, or will be made."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free / 2**30
    text = f"{free:.0f} GiB free in {folder}"
    if not os.access(folder, os.W_OK):
        return Finding(name, "bad", text, "not writable")
    if free <= REQUIRED_DISK_GIB:
        return Finding(name, "note", text, "checkpoints may not fit")
    return Finding(name, "ok", text)


def check_shared_memory() -> Finding:
    """Shared memory for the data loader's workers."""
    free = shutil.disk_usage("/dev/shm").free / 2**30
    text = f"{free:.1f} GiB"
    if free < REQUIRED_SHM_GIB:
        advice = "set trainer.num_workers=0, or give the container more (--shm-size)"
        return Finding("shared memory", "note", text, advice)
    return Finding("shared memory", "ok", text)


def list_changes() -> Iterator[Finding]:
    """List the changes to upstream that a run here makes, and those not tested with the installed versions."""
    here = patches.Platform.with_gpus(visible_gpus())
    made = [item.name for item in registered() if item.wanted(here)]
    yield Finding("patches", "ok", f"{len(made)}: {', '.join(made)}")
    others = [f"{item.name} ({item.module.removeprefix('posttrain.')})" for item in CHANGES]
    yield Finding("other changes", "ok", f"{len(others)}: {', '.join(others)}")
    for item in (*registered(), *CHANGES):
        if item.when(here) and item.untested():
            yield check_untested(item)


def check_untested(change: patches.Change) -> Finding:
    """Say what it means that a change was not tested with what is installed."""
    text = f"{change.kind}; {', '.join(change.untested())}"
    name = f"patch {change.name}"
    if allowed_untested():
        return Finding(name, "note", text, f"{patches.UNTESTED}=1: made all the same")
    if change.kind is patches.Kind.CORRECTNESS:
        return Finding(name, "bad", text, f"runs stop, since without it: {change.symptom}; see {patches.UNTESTED}")
    return Finding(name, "note", text, f"skipped: {change.symptom}")


def print_findings(findings: list[Finding]) -> None:
    """Print a table on the terminal."""
    table = Table(box=None, show_header=False)
    for finding in findings:
        mark = f"[{COLORS[finding.state]}]{finding.state}[/]"
        text = finding.text
        if finding.advice:
            text += f"\n[dim]{finding.advice}[/]"
        table.add_row(mark, finding.name, text)
    Console(highlight=False).print(table)


@stop.command
def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m posttrain.doctor", description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print a list of objects")
    args = parser.parse_args()
    findings = list(examine())
    if args.json:
        print(json.dumps(list(map(asdict, findings)), indent=2))
    else:
        print_findings(findings)
    if any(finding.state == "bad" for finding in findings):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
