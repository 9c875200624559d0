"""What the kernels of soft-capped attention can compute; read where a run is planned, without torch."""

HIGHEST_CAP = 64.0  # sums of e^64 are far from the end of fp32's range; Gemma 2 has 50
WIDEST_HEAD = 256  # features; blocks of wider ones don't fit into shared memory
