"""posttrain: Hydra-composed post-training of language models on Megatron-Bridge and Megatron-Core."""

__version__ = "0.1.0"
