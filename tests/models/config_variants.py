"""Unusual values of fields of config.json, by family: honoured, so that logits are transformers', or refused."""

from typing import Any

SIZES = {
    "vocab_size": 517,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "head_dim": 16,
}
GPT2 = {"vocab_size": 517, "n_embd": 64, "n_inner": 112, "n_layer": 4, "n_head": 4, "n_positions": 512}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
NEOX = {name: value for name, value in SIZES.items() if name not in ("head_dim", "num_key_value_heads")}
GEMMA2 = {"sliding_window": 32, "query_pre_attn_scalar": 12, "tie_word_embeddings": True}
EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "norm_topk_prob": True}
# model_type -> the usual fields of its tiny model.
BASE: dict[str, dict[str, Any]] = {
    "llama": SIZES,
    "mistral": {**SIZES, "sliding_window": None},
    "mixtral": {**SIZES, "sliding_window": None, "num_local_experts": 5, "num_experts_per_tok": 2},
    "qwen2": {name: value for name, value in SIZES.items() if name != "head_dim"},
    "qwen3": SIZES,
    "qwen3_moe": {**SIZES, **EXPERTS},
    "gemma": {**SIZES, "tie_word_embeddings": True},
    "gemma2": {**SIZES, **GEMMA2},
    "gpt2": {**GPT2, **NO_DROPOUT},
    "gpt_neox": NEOX,
}


def rope(kind: str, theta: float = 1e4, **parameters: Any) -> dict[str, Any]:
    """Fields of a scaled rotary embedding."""
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **parameters}}


ORIGINAL = {"original_max_position_embeddings": 64}
BANDS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
SHORT = [1.0, 1.0, 1.0, 1.25, 1.5, 1.75, 2.0, 2.0]
LONG = [1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.0]
FOUR = {"factor": 4.0}
# Those that every rotary embedding can have.
FREQUENCIES = {
    "linear": rope("linear", **FOUR),
    "dynamic": rope("dynamic", **FOUR),
    "llama3": rope("llama3", 5e5, **FOUR, **BANDS, **ORIGINAL),
    "llama3_narrow": rope("llama3", **FOUR, low_freq_factor=1.0, high_freq_factor=2.0, **ORIGINAL),
    "llama3_4096": {
        **rope("llama3", 5e5, factor=8.0, **BANDS, original_max_position_embeddings=4096),
        "max_position_embeddings": 32768,
    },
}
# Those that scale attention too.
SCALES = {
    "yarn": rope("yarn", 1e6, **FOUR, **ORIGINAL),
    "yarn_factor": rope("yarn", **FOUR, **ORIGINAL, attention_factor=1.3),
    "yarn_betas": rope("yarn", **FOUR, **ORIGINAL, beta_fast=16.0, beta_slow=2.0, truncate=False),
    "yarn_mscale": rope("yarn", **FOUR, **ORIGINAL, mscale=0.8, mscale_all_dim=0.5),
    "longrope": rope("longrope", **FOUR, original_max_position_embeddings=256, short_factor=SHORT, long_factor=LONG),
}
ROPES = {**FREQUENCIES, **SCALES}
LAYER_TYPES = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
WINDOW = {"use_sliding_window": True, "sliding_window": 32}
ACTIVATIONS = {name: {"hidden_act": name} for name in ("gelu", "gelu_pytorch_tanh", "quick_gelu", "relu", "relu2")}
PLAIN = {
    "usual": {},
    "eps": {"rms_norm_eps": 1e-3},
    "theta": {"rope_theta": 5e5},
    "tied": {"tie_word_embeddings": True},
}
OTHER_HEADS = {"one_group": {"num_key_value_heads": 1}, "wide_heads": {"head_dim": 32}}
UNTIED = {"untied": {"tie_word_embeddings": False}}
ATTENTION_BIAS = {"attention_bias": {"attention_bias": True}}

HONOURED: dict[str, dict[str, dict[str, Any]]] = {
    "llama": {
        **PLAIN,
        **OTHER_HEADS,
        **ROPES,
        **ACTIVATIONS,
        **ATTENTION_BIAS,
        "mlp_bias": {"mlp_bias": True},
        "biases": {"attention_bias": True, "mlp_bias": True},
    },
    "mistral": {**PLAIN, **OTHER_HEADS, **ROPES, **ACTIVATIONS, "window": {"sliding_window": 32}},
    "mixtral": {
        **PLAIN,
        **ROPES,
        **ACTIVATIONS,
        "window": {"sliding_window": 32},
        "three_experts": {"num_experts_per_tok": 3},
    },
    "qwen2": {
        **PLAIN,
        **ROPES,
        **ACTIVATIONS,
        "window": {**WINDOW, "max_window_layers": 2},
        "layer_types": {**WINDOW, "layer_types": LAYER_TYPES},
        "window_unused": {"sliding_window": 32, "use_sliding_window": False},
    },
    "qwen3": {
        **PLAIN,
        **OTHER_HEADS,
        **ROPES,
        **ACTIVATIONS,
        **ATTENTION_BIAS,
        "window": {**WINDOW, "max_window_layers": 2},
        "layer_types": {**WINDOW, "layer_types": LAYER_TYPES},
    },
    "qwen3_moe": {
        **PLAIN,
        **ROPES,
        **ACTIVATIONS,
        **ATTENTION_BIAS,
        "window": WINDOW,
        "one_expert": {"num_experts_per_tok": 1, "norm_topk_prob": False},
        "unnormed": {"norm_topk_prob": False},
    },
    "gemma": {**PLAIN, **OTHER_HEADS, **ROPES, **ACTIVATIONS, **ATTENTION_BIAS, **UNTIED},
    "gemma2": {
        **PLAIN,
        **ROPES,
        **ATTENTION_BIAS,
        **UNTIED,
        "gelu": {"hidden_activation": "gelu"},
        "layer_types": {"layer_types": LAYER_TYPES},
        "full": {"layer_types": ["full_attention"] * 4},
        "no_caps": {"attn_logit_softcapping": None, "final_logit_softcapping": None},
    },
    "gpt2": {
        "usual": {},
        **UNTIED,
        "eps": {"layer_norm_epsilon": 1e-3},
        "gelu": {"activation_function": "gelu"},
        "relu": {"activation_function": "relu"},
        "upcast": {"reorder_and_upcast_attn": True},
    },
    "gpt_neox": {
        "usual": {},
        **FREQUENCIES,
        "tied": {"tie_word_embeddings": True},
        "eps": {"layer_norm_eps": 1e-3},
        "half": {"rotary_pct": 0.5},
        "sequential": {"use_parallel_residual": False},
        "relu": {"hidden_act": "relu"},
    },
}
# Fields that a config.json leaves out, where what transformers takes instead does not follow from other fields; and
# the sizes that its value goes together with.
LEFT_OUT: dict[str, dict[str, dict[str, Any]]] = {
    "mistral": {"num_key_value_heads": {"num_attention_heads": 16, "head_dim": 4}},
    "mixtral": {"num_local_experts": {}, "num_experts_per_tok": {}},
    "qwen3": {"head_dim": {}},
    "qwen3_moe": {"num_experts_per_tok": {"num_experts": 9}, "norm_topk_prob": {}},
    "gemma": {"head_dim": {}, "tie_word_embeddings": {}},
    "gemma2": {"final_logit_softcapping": {}, "attn_logit_softcapping": {}, "query_pre_attn_scalar": {}},
    "gpt2": {"n_positions": {}},
    "gpt_neox": {"rope_parameters": {}, "use_parallel_residual": {}},
}
NAN = float("nan")
NO_MODEL = {
    "theta_zero": ({"rope_theta": 0}, r"rope_theta=0: must be a number above 1"),
    "theta_negative": ({"rope_theta": -1.0}, r"rope_theta=-1.0: must be"),
    "theta_nan": ({"rope_theta": NAN}, r"rope_theta=nan: must be"),
    "eps_nan": ({"rms_norm_eps": NAN}, r"rms_norm_eps=nan: must be a positive number"),
    "odd_heads": ({"head_dim": 15}, r"head_dim=15: must be even"),
    "groups": ({"num_key_value_heads": 3}, r"num_key_value_heads=3: must divide the 4 attention heads"),
    "no_layers": ({"num_hidden_layers": 0}, r"num_hidden_layers=0: must be a positive whole number"),
}
ANY = {
    "unknown": ({"attention_sinks": 4}, r"attention_sinks=4: is not known, and ignoring it could build another model"),
    "in_one_line": ({"a\nb": "c\nd"}, r"is not known"),
    "padding": ({"pad_token_id": 517}, r"pad_token_id=517: is beyond vocab_size=517"),
    "dtype": ({"torch_dtype": "torch.bfloat16"}, r"torch_dtype=torch.bfloat16: must be float32 or float16 or"),
    "code": (
        {"auto_map": {"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}},
        r"auto_map=modeling_own.OwnForCausalLM: is a class of the model's own",
    ),
    "quantised": ({"quantization_config": {"bits": 4}}, r"quantization_config=.*must be absent: give the model whose"),
}
ROTARY = {
    "unknown_kind": (rope("ntk", factor=2.0), r"the kind 'ntk' is not supported here; supported: default, linear"),
    "no_factor": (rope("yarn"), r"rope_parameters=.*factor is missing"),
    "unknown_parameter": (rope("linear", factor=2.0, alpha=3), r"alpha=3: is not known"),
    "huge_theta": (rope("default", 10**400), r"rope_theta=10*\.\.\.: must be a number above 1"),
    "part_of_a_head": (rope("default", partial_rotary_factor=0.5), r"partial_rotary_factor=0.5: must be 1.0 or 1"),
    "few_factors": (
        rope("longrope", factor=4.0, **ORIGINAL, short_factor=[1.0] * 3, long_factor=[1.0] * 3),
        r"short_factor: has 3 factors for heads of 16 features",
    ),
    "two_kinds": (
        {"rope_scaling": {"rope_type": "linear", "type": "dynamic", "factor": 4.0}},
        r"type=dynamic, but rope_type=linear; programs differ",
    ),
    "zero_factor": (rope("linear", factor=0), r"factor=0: must be a number from 1 on"),
    "said_twice": (
        {"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_parameters": {"rope_type": "default"}},
        r"rope_parameters.rope_type=default: the file says linear elsewhere",
    ),
}
ACTIVATION = {"activation": ({"hidden_act": "mish"}, r"hidden_act=mish: must be silu or")}
LAYERS = {
    "too_few_types": ({"layer_types": ["full_attention"]}, r"layer_types: has 1 entries for 4 layers"),
    "types_in_types": ({"layer_types": [["full_attention"]] * 4}, r"layer_types=.*must be a list of full_attention"),
    "unknown_types": ({"layer_types": ["chunked_attention"] * 4}, r"layer_types=.*must be a list of full_attention"),
}
NO_WINDOW = {
    "no_window": (
        {"layer_types": LAYER_TYPES, "use_sliding_window": False},
        r"layer_types: has sliding_attention, but use_sliding_window is not true",
    ),
}
# model_type -> variant -> fields, and what the one line says.
REFUSED: dict[str, dict[str, tuple[dict[str, Any], str]]] = {
    "llama": {**NO_MODEL, **ANY, **ROTARY, **ACTIVATION},
    "mistral": {**NO_MODEL, **ANY, **ROTARY, "layers": ({"layer_types": LAYER_TYPES}, "layer_types=.*is not known")},
    "mixtral": {
        **NO_MODEL,
        **ANY,
        **ROTARY,
        "one_expert": ({"num_experts_per_tok": 1}, r"num_experts_per_tok=1: must be a whole number from 2 on"),
        "few_experts": ({"num_experts_per_tok": 6}, r"num_experts_per_tok=6: there are 5 experts"),
        "jitter": ({"router_jitter_noise": 0.1}, r"router_jitter_noise=0.1: must be 0.0 or 0"),
        "yarn_without_head": (
            {**rope("yarn", factor=2.0), "head_dim": None},
            r"head_dim: is missing, and transformers cannot compute the rotary embedding 'yarn'",
        ),
    },
    "qwen2": {**NO_MODEL, **ANY, **ROTARY, **ACTIVATION, **LAYERS, **NO_WINDOW},
    "qwen3": {**NO_MODEL, **ANY, **ROTARY, **ACTIVATION, **LAYERS, **NO_WINDOW},
    "qwen3_moe": {
        **NO_MODEL,
        **ANY,
        **ROTARY,
        "dense_layers": ({"mlp_only_layers": [0]}, r"mlp_only_layers=\[0\]: must be \[\]"),
        "sparse_step": ({"decoder_sparse_step": 2}, r"decoder_sparse_step=2: must be 1"),
        "one_expert": ({"num_experts_per_tok": 1}, r"num_experts_per_tok=1: is not supported with norm_topk_prob"),
    },
    "gemma": {
        **NO_MODEL,
        **ANY,
        **ROTARY,
        "two_activations": (
            {"hidden_act": "gelu", "hidden_activation": "gelu_pytorch_tanh"},
            r"hidden_act=gelu: hidden_activation=gelu_pytorch_tanh says otherwise",
        ),
        "bidirectional": ({"use_bidirectional_attention": True}, r"use_bidirectional_attention=True: must be false"),
    },
    "gemma2": {**NO_MODEL, **ANY, **ROTARY, **LAYERS},
    "gpt2": {
        **ANY,
        "by_layer": ({"scale_attn_by_inverse_layer_idx": True}, r"scale_attn_by_inverse_layer_idx=True: must be false"),
        "unscaled": ({"scale_attn_weights": False}, r"scale_attn_weights=False: must be true"),
        "two_dropouts": ({"embd_pdrop": 0.1}, r"embd_pdrop=0.1: must be resid_pdrop=0.0"),
        "activation": ({"activation_function": "mish"}, r"activation_function=mish: must be"),
    },
    "gpt_neox": {
        **ANY,
        "yarn": (rope("yarn", factor=4.0, **ORIGINAL), r"the kind 'yarn' is not supported here"),
        "no_bias": ({"attention_bias": False}, r"attention_bias=False: must be true"),
        "theta_zero": ({"rotary_emb_base": 0}, r"rotary_emb_base=0: must be a number above 1"),
        "two_thetas": (
            {"rotary_emb_base": 10000, "rope_theta": 5e5},
            r"rotary_emb_base=10000: the file says 500000.0 elsewhere",
        ),
        "two_shares": (
            {"rotary_pct": 0.5, "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}},
            r"rope_parameters.partial_rotary_factor=0.25: the file says 0.5 elsewhere",
        ),
        "share": ({"rotary_pct": 0.0}, r"rotary_pct=0.0: must be a number above 0, at most 1"),
    },
}
