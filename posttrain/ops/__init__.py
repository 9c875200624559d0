"""Operations of a training step: attention, Triton kernels, losses, products in 8 bits, fused LoRA."""
