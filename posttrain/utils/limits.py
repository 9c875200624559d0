"""The limits that a shell or a cluster sets for a process (`ulimit`), where they are too low for torch and its threads.

Below them things fail far from the cause: a thread that can't be started, a crash without a word.
"""

import resource

from posttrain.errors import UserError

KIB = 1024
# Limit -> the least that a run needs, what a lower one is raised to, its name, and how to raise it by hand.
NEEDED = {
    resource.RLIMIT_NOFILE: (256, 4096, "open files (at least {})", "ulimit -n 4096"),
    resource.RLIMIT_STACK: (1024 * KIB, 8192 * KIB, "bytes of stack (at least {})", "ulimit -s 8192"),
    resource.RLIMIT_NPROC: (64, 4096, "processes and threads of this user (at least {})", "ulimit -u 4096"),
}


def raise_low() -> None:
    """Raise limits that are too low, for this process and those that it starts, as far as it may.

    Raises:
        UserError: it may not.
    """
    for limit, (least, target, name, command) in NEEDED.items():
        soft, hard = resource.getrlimit(limit)
        if soft == resource.RLIM_INFINITY or soft >= least:
            continue
        if hard != resource.RLIM_INFINITY:
            target = min(hard, target)
        if target < least:
            raise UserError(f"the limit of {soft} {name.format(least)} is too low here; raise it: {command}")
        resource.setrlimit(limit, (target, hard))
