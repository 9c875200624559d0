"""CPU time to import what a text run needs, as upstream does it and with the project's patches, side by side.

    python bench/imports.py [--repeats N] [--architecture LlamaForCausalLM] [--transformer-engine]

Each measurement is a fresh process; the two kinds take turns, so that a busy machine is busy for both, and the median
counts. Packages that upstream insists on and that are not installed are empty modules in the plain import: it is
charged nothing for them. `--transformer-engine`: with Transformer Engine, which must be installed.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys

MODULES = """
import megatron.core.dist_checkpointing
import megatron.bridge.training.finetune, megatron.bridge.training.gpt_step, megatron.bridge.training.checkpointing
import megatron.bridge.training.config, megatron.bridge.training.callbacks, megatron.bridge.training.model_load_save
from megatron.bridge import AutoBridge
from megatron.bridge.peft.lora import LoRA
from megatron.bridge.peft.dora import DoRA
from megatron.bridge.peft.canonical_lora import CanonicalLoRA
"""

STAND_INS = """
import importlib.abc, importlib.machinery, importlib.util, types

class Empty(type):  # what an empty module has: classes, since some of them are subclassed
    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Empty(name, (), {})

class Module(types.ModuleType):
    __version__ = "0.0.0"
    __getattr__ = Empty.__getattr__

class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path, target=None):
        if name in missing or name.startswith(tuple(root + "." for root in missing if root != "nvidia_resiliency_ext")):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
    def create_module(self, spec):
        return Module(spec.name)
    def exec_module(self, module):
        pass

def installed(name):
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False

hard = ("nvidia_resiliency_ext", "nvidia_resiliency_ext.inprocess", "modelopt", "megatron.energon", "webdataset",
        "diffusers")
missing = [name for name in hard if not installed(name)]
sys.meta_path.append(Finder())
if not installed("transformer_engine"):  # core does without and must not see the stand-in; a module of Bridge needs it
    import megatron.core.extensions.transformer_engine
    missing.append("transformer_engine")
"""

PATCHED = """
from posttrain.patches import Platform, apply
from posttrain.patches.startup.imports import need
apply(Platform(device={device!r}, transformer_engine={transformer_engine}))
"""

REPORT = """
import json, resource
rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print("MEASURED", json.dumps({"cpu": time.process_time(), "wall": time.perf_counter() - start,
                              "modules": len(sys.modules), "rss": rss}))
"""


def measure(kind: str, architecture: str, transformer_engine: bool) -> dict[str, float]:
    """Run one import in a fresh process; return CPU and wall seconds, number of modules, and peak memory in bytes."""
    device = "cuda" if transformer_engine else "cpu"
    prepare = {
        "torch": "import torch",
        "plain": "import torch\n" + STAND_INS + MODULES,
        "patched": PATCHED.format(device=device, transformer_engine=transformer_engine)
        + MODULES
        + f"need({architecture!r})\n",
    }[kind]
    code = "import sys, time\nstart = time.perf_counter()\n" + prepare + REPORT
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, env=os.environ)
    found = [line for line in done.stdout.splitlines() if line.startswith("MEASURED ")]
    if not found:
        raise SystemExit(f"the {kind} import failed:\n{done.stderr}")
    return json.loads(found[0].removeprefix("MEASURED "))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--architecture", default="LlamaForCausalLM")
    parser.add_argument("--transformer-engine", action="store_true")
    args = parser.parse_args()

    kinds = ("torch", "plain", "patched")
    runs = {kind: [] for kind in kinds}
    for _ in range(args.repeats + 1):  # the first round warms the disk's cache and compiles to bytecode
        for kind in kinds:
            runs[kind].append(measure(kind, args.architecture, args.transformer_engine))
    print(f"{'':8} {'CPU s':>7} {'wall s':>7} {'modules':>8} {'peak MB':>8}   median of {args.repeats}")
    medians = {}
    for kind in kinds:
        medians[kind] = {key: statistics.median(run[key] for run in runs[kind][1:]) for key in runs[kind][0]}
        row = medians[kind]
        print(f"{kind:8} {row['cpu']:7.2f} {row['wall']:7.2f} {row['modules']:8.0f} {row['rss'] / 2**20:8.0f}")
    print(f"patched / plain: {medians['patched']['cpu'] / medians['plain']['cpu']:.2f} of the CPU time")


if __name__ == "__main__":
    main()
