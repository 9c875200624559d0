"""One tiny architecture of each family, shaped so that mistakes show: grouped queries, odd sizes, short windows."""

LLAMA = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
MOE = {"num_experts_per_tok": 2}
GEMMA2 = {
    "sliding_window": 5,
    "query_pre_attn_scalar": 12,
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 3.0,
}
NEOX = {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"}
GPT2 = {"vocab_size": 96, "n_positions": 64, "n_embd": 32, "n_layer": 4, "n_head": 4}
DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LLAMA31 = {"max_position_embeddings": 16384, "rope_theta": 500000.0, "rope_scaling": LLAMA3_ROPE}
# Name -> (transformers' model_type, its config fields).
FAMILIES = {
    "llama": ("llama", LLAMA),
    "llama31": ("llama", {**LLAMA, **LLAMA31}),
    "llama32": ("llama", {**LLAMA, "tie_word_embeddings": True, "head_dim": 16}),
    "mistral": ("mistral", {**LLAMA, "sliding_window": 5, "head_dim": 8}),
    "mixtral": ("mixtral", {**LLAMA, **MOE, "num_local_experts": 4, "sliding_window": None}),
    "gemma": ("gemma", {**LLAMA, "num_key_value_heads": 1, "head_dim": 16, "tie_word_embeddings": True}),
    "gemma2": ("gemma2", {**LLAMA, **GEMMA2, "head_dim": 16, "tie_word_embeddings": True}),
    "qwen2": ("qwen2", LLAMA),
    "qwen3": ("qwen3", {**LLAMA, "head_dim": 16, "tie_word_embeddings": True}),
    "qwen3_moe": ("qwen3_moe", {**LLAMA, **MOE, "head_dim": 16, "num_experts": 4, "moe_intermediate_size": 24,
                                "norm_topk_prob": True}),
    "gpt2": ("gpt2", {**GPT2, **DROPOUT}),
    "gpt_neox": ("gpt_neox", {**NEOX, "rotary_pct": 0.25}),
    "gpt_neox_sequential": ("gpt_neox", {**NEOX, "rotary_pct": 0.5, "use_parallel_residual": False}),
}  # fmt: skip

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 8}
WINDOW = {"use_sliding_window": True, "sliding_window": 5}
LAYER_TYPES = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
# Unusual fields of config.json, a kind each that has code of its own (the others: config_variants.py).
FIELDS = [
    ("llama", {"rope_parameters": YARN}),
    ("llama", {"attention_bias": True}),
    ("llama", {"mlp_bias": True}),
    ("llama", {"hidden_act": "gelu"}),
    ("qwen2", {**WINDOW, "max_window_layers": 2}),
    ("qwen3", {**WINDOW, "layer_types": LAYER_TYPES, "attention_bias": True}),
    ("qwen3_moe", {"attention_bias": True}),
    ("gemma", {"hidden_act": "gelu", "tie_word_embeddings": False}),
    ("gemma2", {"rope_parameters": YARN, "layer_types": LAYER_TYPES}),
    ("gpt2", {"tie_word_embeddings": False}),
    ("gpt_neox", {"rope_parameters": {"rope_type": "linear", "factor": 4.0}}),
]


def named(value: object) -> str:
    """The id of a test's parameter: a family, or the names of fields."""
    return value if isinstance(value, str) else "+".join(value)


WIDTHS = ("hidden_size", "intermediate_size", "moe_intermediate_size", "head_dim", "n_embd", "query_pre_attn_scalar")


def save_random(family: str, directory, seed: int = 0, width: int = 1, **more):
    """Write a random fp32 model of `family` to `directory`; return it. Norms and biases are random too.

    Args:
        family: a key of FAMILIES.
        directory: where to.
        seed: of the weights.
        width: the model is made wider by this factor; kernels of GPUs want heads of 32 and more.
        more: further fields of the config.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, fields = FAMILIES[family]
    fields = {name: value * width if name in WIDTHS else value for name, value in fields.items()}
    torch.manual_seed(seed)
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = AutoConfig.for_model(model_type, **{**fields, **tokens, **more})
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
            else:
                parameter.mul_(10.0 / width**0.5)
    model.save_pretrained(directory)
    return model
