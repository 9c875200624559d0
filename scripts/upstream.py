"""What the newest released upstream would change: patches that still fit, versions out of range, tests that fail.

    python scripts/upstream.py [--environment .venv-upstream] [--no-tests]

Resolves Megatron-Bridge and Megatron-Core to the newest releases there are, keeping the versions of uv.lock for
everything else as far as they allow, installs them into an environment of its own, and reports. Transformer Engine is
compiled where there are a GPU and nvcc. Exit code 1: something does not fit or fails.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
UV = str(ROOT / "scripts" / "uv.sh")
NEWEST = ("megatron-bridge", "megatron-core")
TRANSFORMER_ENGINE = "transformer-engine[core-cu13,pytorch]"
TESTS = (
    "tests/patches",
    "tests/models/test_hf.py",
    "tests/models/test_bridges.py",
    "tests/models/test_adapters.py",
    "tests/models/test_example_family.py",
)
SWITCH = "POSTTRAIN_UNTESTED_UPSTREAM"
# Run in the new environment, on one platform: its patches, and whether they fit when all that they change is imported.
PROBE = """
import os
import sys
from posttrain import patches
from posttrain.launch import worker
from posttrain.patches.elsewhere import CHANGES
from posttrain.patches.runner import registered

platform = patches.Platform.detect(sys.argv[1])
changes = [change for change in (*registered(), *CHANGES) if change.when(platform)]
outside = {change.name: ", ".join(change.untested()) for change in changes if change.untested()}
within = [change.name for change in changes if change.name not in outside]
print(f"  within their tested versions: {len(within)} of {len(changes)}")
for name, versions in outside.items():
    print(f"  out of range: {name}: {versions}")
os.environ["POSTTRAIN_DEVICE"] = sys.argv[1]
worker.import_all()
print("  all that the platform needs were applied, and what a run uses was imported")
"""


def relaxed(project: str) -> str:
    """The text of a pyproject.toml whose exact versions in `dependencies` are lower bounds."""
    begin = project.index("dependencies = [")
    end = project.index("\n]", begin)
    return project[:begin] + project[begin:end].replace("==", ">=") + project[end:]


def locked(lock: Path) -> dict[str, str]:
    """Package -> version of a uv.lock."""
    packages = tomllib.loads(lock.read_text())["package"]
    return {package["name"]: package["version"] for package in packages if "version" in package}


def resolve(folder: Path) -> dict[str, str]:
    """Write pyproject.toml and uv.lock with the newest upstream into `folder`.

    Returns:
        Package -> `old -> new`, where this checkout's lock has another version.
    """
    folder.joinpath("pyproject.toml").write_text(relaxed((ROOT / "pyproject.toml").read_text()))
    shutil.copy(ROOT / "uv.lock", folder)
    shutil.copy(ROOT / "README.md", folder)
    upgrades = [word for name in NEWEST for word in ("--upgrade-package", name)]
    uv("lock", "--project", str(folder), "--python", sys.executable, *upgrades)
    before, after = locked(ROOT / "uv.lock"), locked(folder / "uv.lock")
    moved = {}
    for name in sorted(before.keys() | after.keys()):
        if before.get(name) != after.get(name):
            moved[name] = f"{before.get(name, 'absent')} -> {after.get(name, 'absent')}"
    return moved


def install(folder: Path, environment: Path) -> None:
    """Install what `folder` locks into `environment`, and Transformer Engine where it can be compiled."""
    words = ["sync", "--project", str(folder), "--frozen", "--no-install-project", "--extra", "dev", "--extra", "demo"]
    uv(*words, "--python", sys.executable, UV_PROJECT_ENVIRONMENT=str(environment))
    if not has_gpu() or shutil.which("nvcc") is None:
        print("Transformer Engine: not installed, it takes a GPU and nvcc; what needs it is not looked at")
        return
    python = str(environment / "bin" / "python")
    uv("pip", "install", "--python", python, "--upgrade", "--no-build-isolation", TRANSFORMER_ENGINE)


def has_gpu() -> bool:
    """Whether NVIDIA's driver lists a GPU."""
    if shutil.which("nvidia-smi") is None:
        return False
    return subprocess.run(["nvidia-smi", "-L"], capture_output=True).returncode == 0


def uv(*words: str, **variables: str) -> None:
    """Run uv; its errors end the script."""
    kept = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"}
    subprocess.run([UV, *words, "--quiet"], check=True, env=kept | variables)


def run(environment: Path, *words: str) -> subprocess.CompletedProcess:
    """Run Python of `environment` on this checkout, with every change made to whatever versions there are."""
    variables = os.environ | {"PYTHONPATH": str(ROOT), SWITCH: "1", "PYTHONWARNINGS": "ignore"}
    command = [str(environment / "bin" / "python"), *words]
    return subprocess.run(command, capture_output=True, text=True, env=variables, cwd=ROOT)


def look_at_patches(environment: Path) -> bool:
    """Print what becomes of the patches on each platform of this machine; whether all fit."""
    fits = True
    for device in ("cpu", "cuda") if has_gpu() else ("cpu",):
        print(f"changes to upstream, {device}:")
        done = run(environment, "-c", PROBE, device)
        print(done.stdout.rstrip())
        if done.returncode:
            fits = False
            print(f"  they do not fit: {done.stderr.strip().splitlines()[-1]}")
    return fits


def look_at_tests(environment: Path) -> bool:
    """Run the tests that tell most about upstream; whether all pass."""
    print(f"tests: {' '.join(TESTS)}")
    done = run(environment, "-m", "pytest", "-q", "-n", "2", "--dist", "loadfile", *TESTS)
    for line in done.stdout.splitlines():
        if re.match(r"(FAILED|ERROR) |.* in [\d.]+s", line):
            print(f"  {line}")
    if done.returncode and "short test summary" not in done.stdout:
        print(done.stdout[-2000:] + done.stderr[-2000:])
    return done.returncode == 0


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--environment", type=Path, default=ROOT / ".venv-upstream")
    parser.add_argument("--no-tests", action="store_true", help="look at the patches alone")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        moved = resolve(Path(scratch))
        after = locked(Path(scratch) / "uv.lock")
        print("newest releases: " + ", ".join(f"{name} {after[name]}" for name in NEWEST))
        print(f"packages in other versions than uv.lock has: {len(moved)}")
        for name, change in moved.items():
            print(f"  {name} {change}")
        sys.stdout.flush()
        install(Path(scratch), options.environment.resolve())
    fits = look_at_patches(options.environment)
    sys.stdout.flush()
    passes = options.no_tests or look_at_tests(options.environment)
    raise SystemExit(0 if fits and passes else 1)


if __name__ == "__main__":
    main()
