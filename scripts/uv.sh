#!/usr/bin/env bash
# uv: the one on the PATH if it is new enough, else one installed with pip into .tools/.   usage: scripts/uv.sh ARGS...
set -euo pipefail
tools=$(cd "$(dirname "$0")/.." && pwd)/.tools
oldest=0.9.0

usable() { # $1: a command; a pyenv shim without a program behind it fails here
    local version
    version=$("$1" --version 2>/dev/null | awk '{print $2}') || return 1
    [[ -n $version && $(printf '%s\n' "$oldest" "$version" | sort -V | head -n 1) == "$oldest" ]]
}

for uv in uv "$tools/bin/uv"; do
    if usable "$uv"; then exec "$uv" "$@"; fi
done
for python in python3.12 python3 /usr/bin/python3 python; do
    if "$python" -c 'import venv, ensurepip' 2>/dev/null; then
        echo "Installing uv into .tools/ with $("$python" --version)" >&2
        "$python" -m venv --clear "$tools" && "$tools/bin/pip" install --quiet "uv>=$oldest" >&2 || break
        exec "$tools/bin/uv" "$@"
    fi
done
echo "error: uv $oldest or newer is needed, and could not be installed with pip into .tools/" >&2
echo "       install uv (https://docs.astral.sh/uv), or a Python with venv and pip (Debian: python3-venv)" >&2
exit 1
