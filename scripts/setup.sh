#!/usr/bin/env bash
# Make or update .venv from uv.lock; extras that are already in it stay.   usage: scripts/setup.sh EXTRA...
set -euo pipefail
cd "$(dirname "$0")/.."

scripts/uv.sh --version >/dev/null # installs it if need be
python=$(scripts/uv.sh python find --no-project 3.12 2>/dev/null) ||
    python=$(ls -d "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12*/bin/python3.12 2>/dev/null | head -n 1) || true
if [[ -z $python ]]; then
    echo "No Python 3.12 on this machine: uv fetches one" >&2
    if ! scripts/uv.sh python install 3.12; then
        echo "error: Python 3.12 is needed (Megatron-Bridge 0.6 supports no other), and uv could not fetch it" >&2
        echo "       install it (pyenv install 3.12, apt install python3.12, ...) and try again" >&2
        exit 1
    fi
    python=3.12
fi
extras=()
for extra in "$@"; do extras+=(--extra "$extra"); done
env -u VIRTUAL_ENV -u UV_PROJECT_ENVIRONMENT scripts/uv.sh sync --frozen --inexact --python "$python" "${extras[@]}"
if command -v nvcc >/dev/null && nvidia-smi -L >/dev/null 2>&1 && [[ " $* " != *" gpu "* ]]; then
    echo "A GPU and nvcc are here: \`scripts/setup.sh gpu\` adds Transformer Engine (compiled for several minutes)" >&2
fi
