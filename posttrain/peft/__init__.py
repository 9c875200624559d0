"""LoRA and DoRA in users' words; what they build is Megatron-Bridge's own adapter object. No torch at import."""

from posttrain.peft.adapters import DoRA, LoRA

__all__ = ["DoRA", "LoRA"]
