"""Bridges between Hugging Face and Megatron for families that upstream lacks, or has in a form we cannot train.

Imports nothing heavy; `register` imports the one module that an architecture needs. Beyond those below, every family
with a bridge in megatron.bridge works as it is.
"""

import importlib

# Architecture (of a config.json) -> the module here that registers its bridge.
MODULES = {
    "GPT2LMHeadModel": "gpt2",  # no bridge upstream
    "GPTNeoXForCausalLM": "gpt_neox",  # no bridge upstream
    "MixtralForCausalLM": "mixtral",  # no bridge upstream
    "GemmaForCausalLM": "gemma",  # upstream insists on the flash-attn package
    "Gemma2ForCausalLM": "gemma2",  # upstream's attention refuses packed sequences and its LoRA sits before a norm
    "Qwen3MoeForCausalLM": "qwen3_moe",  # upstream always adds a load-balancing loss
}


def register(architecture: str | None) -> bool:
    """Register the bridge of `architecture`, replacing upstream's; return whether there is one here."""
    if architecture not in MODULES:
        return False
    importlib.import_module(f"{__name__}.{MODULES[architecture]}")
    return True
