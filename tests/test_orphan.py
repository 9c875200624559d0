"""A child that watches its parent ends with it, without the kernel's help."""

import subprocess
import sys

import psutil

CHILD = """
import os, time
from posttrain import orphan
orphan.end_with(os.getppid())
print(1, flush=True)
time.sleep(600)
"""
PARENT = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", {CHILD!r}], stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
time.sleep(600)
"""


def test_it_ends_with_a_killed_parent_and_not_before():
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    child = psutil.Process(int(parent.stdout.readline()))
    assert psutil.wait_procs([child], timeout=3)[1], "the child ended before its parent"
    parent.kill()
    parent.wait()
    assert psutil.wait_procs([child], timeout=60)[0], "the child outlived its parent"
