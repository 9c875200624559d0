"""Patches without which a run would be wrong or lost."""
