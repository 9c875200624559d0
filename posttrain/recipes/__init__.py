"""Megatron-Bridge's own recipes as a start: `python -m posttrain recipe.name=NAME`.

A recipe is a Python function that returns Megatron-Bridge's whole configuration. `names` finds them without importing
anything, `resolve` runs one in a process of its own and keeps what it returns as plain data, `translate` says it in
this project's words, and `layer` puts those words below everything that the command line says.
"""
