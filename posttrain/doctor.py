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

from posttrain import stop

# What the tests ran with; another version may work.
TESTED = {
    "torch": "2.11.0", "megatron-core": "0.19.2", "megatron-bridge": "0.6.2", "transformers": "5.12.1",
    "hydra-core": "1.3.8", "omegaconf": "2.3.1", "transformer-engine": "2.18.0",
}  # fmt: skip
NEEDED_FREE_GIB = 5.0
NEEDED_SHM_GIB = 1.0


@dataclass
class Finding:
    """One line of the report.

    Attributes:
        name: what was looked at.
        state: ok, note (works, but something is lost) or bad (a run fails).
        text: what was found.
        advice: what a note or bad costs and how to mend it.
    """

    name: str
    state: str
    text: str
    advice: str = ""


def findings() -> Iterator[Finding]:
    """Everything, cheapest first."""
    yield python()
    yield from packages()
    yield from gpus()
    yield transformer_engine()
    yield slurm()
    yield from room()
    yield applied_patches()


def python() -> Finding:
    """Megatron-Bridge 0.6 has wheels for one Python."""
    version = platform.python_version()
    if sys.version_info[:2] == (3, 12):
        return Finding("Python", "ok", version)
    return Finding("Python", "bad", version, "Megatron-Bridge 0.6 needs Python 3.12")


def packages() -> Iterator[Finding]:
    """Installed versions against the tested ones."""
    for name, tested in TESTED.items():
        if name == "transformer-engine":
            continue
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(name, "bad", "not installed", f"install the project with uv; tested: {tested}")
            continue
        same = found.split("+")[0] == tested
        advice = "" if same else f"tested: {tested}; a patch may not fit, see the log's list of patches"
        yield Finding(name, "ok" if same else "note", found, advice)


def gpus() -> Iterator[Finding]:
    """Driver, CUDA and NCCL as torch sees them."""
    from posttrain.launch import visible_gpus

    count = visible_gpus()
    if not count:
        yield Finding("GPU", "note", "none visible", "runs use the CPU in fp32: for small models and tests")
        return
    import torch

    if not torch.cuda.is_available():
        yield Finding("GPU", "bad", f"{count} visible, none usable", "torch's CUDA build and the driver don't fit")
        return
    names = sorted({torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())})
    yield Finding("GPU", "ok", f"{torch.cuda.device_count()} x {', '.join(names)}")
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True).stdout.split()[:1] if shutil.which(query[0]) else []
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    yield Finding("CUDA", "ok", f"{torch.version.cuda}, driver {driver[0] if driver else 'unknown'}, NCCL {nccl}")


def transformer_engine() -> Finding:
    """Layers, fused attention, fp8, context parallelism and CUDA graphs hang on it."""
    if importlib.util.find_spec("transformer_engine") is None:
        lost = "no fp8, context parallelism or CUDA graphs, slower layers; on a GPU: uv sync --extra gpu (needs nvcc)"
        return Finding("Transformer Engine", "note", "not installed", lost)
    found = importlib.metadata.version("transformer-engine")
    same = found == TESTED["transformer-engine"]
    return Finding("Transformer Engine", "ok" if same else "note", found, "" if same else "tested: 2.18.0")


def slurm() -> Finding:
    """Whether jobs can be submitted from here."""
    if shutil.which("sbatch") is None:
        return Finding("Slurm", "note", "sbatch not found", "hydra/launcher=slurm needs it; everything else works")
    asked = subprocess.run(["sbatch", "--version"], capture_output=True, text=True)
    if asked.returncode:
        said = asked.stderr.strip().splitlines() or ["is slurm.conf in place?"]
        return Finding("Slurm", "note", "sbatch does not answer", said[-1])
    return Finding("Slurm", "ok", asked.stdout.strip())


def room() -> Iterator[Finding]:
    """Disk where runs and the cache go, and shared memory for the data loader's workers."""
    from posttrain.cache import cache_root

    for name, folder in (("disk, outputs", Path.cwd()), ("disk, cache", cache_root())):
        while not folder.exists():
            folder = folder.parent
        free = shutil.disk_usage(folder).free / 2**30
        writable = os.access(folder, os.W_OK)
        state = "bad" if not writable else "ok" if free > NEEDED_FREE_GIB else "note"
        advice = "not writable" if not writable else "checkpoints may not fit" if state == "note" else ""
        yield Finding(name, state, f"{free:.0f} GiB free in {folder}", advice)
    if Path("/dev/shm").is_dir():
        free = shutil.disk_usage("/dev/shm").free / 2**30
        small = free < NEEDED_SHM_GIB
        advice = "set trainer.num_workers=0, or give the container more (--shm-size)" if small else ""
        yield Finding("shared memory", "note" if small else "ok", f"{free:.1f} GiB", advice)


def applied_patches() -> Finding:
    """Which changes to upstream a run here would make."""
    from posttrain import patches
    from posttrain.launch import visible_gpus
    from posttrain.patches import catalogue  # noqa: F401  (registers them)

    here = patches.Platform.detect("cuda" if visible_gpus() else "cpu")
    names = [patch.name for patch in patches.REGISTRY.values() if patch.wanted(here)]
    return Finding("patches", "ok", f"{len(names)}: {', '.join(names)}")


@stop.command
def main() -> None:
    """Entry point."""
    options = argparse.ArgumentParser(prog="python -m posttrain.doctor", description=__doc__.splitlines()[0])
    options.add_argument("--json", action="store_true", help="print a list of objects")
    given = options.parse_args()
    found = list(findings())
    if given.json:
        print(json.dumps([asdict(finding) for finding in found], indent=2))
    else:
        from rich.console import Console
        from rich.table import Table

        colours = {"ok": "green", "note": "yellow", "bad": "red"}
        table = Table(box=None, show_header=False)
        for finding in found:
            mark = f"[{colours[finding.state]}]{finding.state}[/]"
            table.add_row(mark, finding.name, finding.text + (f"\n[dim]{finding.advice}[/]" if finding.advice else ""))
        Console(highlight=False).print(table)
    raise SystemExit(1 if any(finding.state == "bad" for finding in found) else 0)


if __name__ == "__main__":
    main()
