"""Start from one of Megatron-Bridge's own recipes: `python -m posttrain recipe.name=NAME`.

A recipe is a Python function that returns Megatron-Bridge's whole configuration. `catalog` finds the
recipes without importing them, `resolve` runs one in a process of its own and stores its result as
plain data, `translate` maps that data to this project's keys, and `layer` puts those keys below
everything that the command line sets.
"""
