"""Weights between Hugging Face directories, PEFT adapters and Megatron checkpoints, checked before they appear."""
