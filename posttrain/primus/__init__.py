"""The way over from Primus, AMD's training framework: its megatron_bridge configurations as experiments of ours.

`read` makes one flat mapping of the forms that such a file can have, `translate` says it in this project's words, and
`experiment` writes it down.
"""
