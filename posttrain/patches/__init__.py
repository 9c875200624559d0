"""Every change to upstream's behaviour, each with its name, its reason, the versions it was tested with, its condition.

`startup/` saves time or memory, `cpu/` is what a machine without a GPU takes, and without what is in `correctness/` a
run would be wrong or lost. `elsewhere.py` lists the changes that are made in other modules of the package.
"""

from posttrain.patches.registry import UNTESTED, Change, Kind, Patch, Platform, patch
from posttrain.patches.runner import applied, apply, check

__all__ = ["UNTESTED", "Change", "Kind", "Patch", "Platform", "applied", "apply", "check", "patch"]
