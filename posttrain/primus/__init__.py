"""Import configurations of Primus, AMD's training framework, as experiments.

`read` turns both forms of a megatron_bridge file into one flat mapping, `translate` maps it to this
project's keys, and `experiment` formats the result as a file and as overrides.
"""
