"""A process that doesn't outlive the one that started it, where the kernel doesn't see to that. No torch here.

Linux kills a child when its parent dies if it is asked to (PR_SET_PDEATHSIG), which ranks and their background writers
do; the kernels of some containers don't.
"""

import os
import signal
import threading
import time

INTERVAL_S = 1.0


def end_with(parent: int) -> None:
    """From now on kill this process once it isn't the child of process `parent` any more."""
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(INTERVAL_S)
    os.kill(os.getpid(), signal.SIGKILL)
