"""Bridges between Hugging Face and Megatron for families that upstream lacks, or has in a form we cannot train.

Imports nothing heavy; `register` imports the one module that an architecture needs. Beyond those below, every family
with a bridge in megatron.bridge works as it is.
"""

import importlib

from posttrain.models.families import family_with


def register(architecture: str | None) -> bool:
    """Register the bridge that the family of `architecture` names, replacing upstream's; return whether it has one."""
    family = family_with(architecture)
    if family is None or family.bridge is None:
        return False
    importlib.import_module(family.bridge)
    return True
