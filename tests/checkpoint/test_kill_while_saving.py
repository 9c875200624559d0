"""SIGKILL inside Megatron's own writer of shards.

At POSTTRAIN_KILL_POINTS points of a save: 3, with `make test-all` 40; `all` are thousands.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from families import save_random
from test_checkpoint_files import memory  # noqa: F401  (a fixture)

pytestmark = pytest.mark.nightly

SCRIPT = Path(__file__).with_name("kill_points.py")


@pytest.mark.every_run
def test_kill_while_megatron_writes(memory, tmp_path, record_property):  # noqa: F811
    save_random("llama", tmp_path)
    few = "40" if os.environ.get("POSTTRAIN_TEST_ALL") else "3"
    points = os.environ.get("POSTTRAIN_KILL_POINTS", few)
    environ = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [sys.executable, SCRIPT, tmp_path, memory, points], env=environ, text=True, capture_output=True
    )
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-4000:]
    ended = json.loads((memory / "ended.json").read_text())
    killed = ended["before"] + ended["after"]
    record_property("kill_points", killed)
    print(f"\n{killed} kill points of {ended['calls']} calls, all recovered: {ended}")
    assert ended["calls"] > 300 and ended["before"] and ended["after"]
    assert points == "all" or killed == int(points)
