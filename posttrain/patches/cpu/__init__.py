"""Patches that let Megatron run on a machine without a GPU."""
