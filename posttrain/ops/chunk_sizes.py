"""How much is computed at once, for those who count memory; without torch."""

LOGIT_ROWS = 2048  # of the output layer's chunks: 0.5 GB at a vocabulary of 128 k in bf16; larger is not faster
