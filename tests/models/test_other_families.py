"""Families without a record, through Megatron-Bridge alone, on a CPU: like transformers, or refused in one line."""

import pytest
import torch
from random_model import write_model

from posttrain.errors import UserError
from posttrain.models import HFModel

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_shared_experts": 1}
LIKE_TRANSFORMERS = {
    "nemotron": {},  # its norms are LayerNorms with gains stored as their difference from one
    "deepseek_v3": {**LATENT, **EXPERTS, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1},
}
OF_TRANSFORMER_ENGINE = {
    "gemma3_text": {"head_dim": 8},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},  # attention sinks
    "glm4_moe": {**EXPERTS, "head_dim": 8, "first_k_dense_replace": 1},  # grouped experts
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8},  # no GPT
}


def build(directory):
    """The imported model, of local layers."""
    from posttrain.models.local_spec import check_expert_names, use_local_layers

    bridge = HFModel(path=str(directory)).bridge()
    provider = bridge.to_megatron_provider()
    use_local_layers(provider)
    check_expert_names(bridge, provider)
    provider.use_cpu_initialization = True
    provider.finalize()
    (part,) = provider.provide_distributed_model(wrap_with_ddp=False, use_cpu_initialization=True)
    return part.eval()


@pytest.mark.parametrize("model_type", LIKE_TRANSFORMERS)
def test_logits(model_type, megatron, tmp_path):
    hf = write_model(model_type, {**SIZES, **LIKE_TRANSFORMERS[model_type]}, tmp_path, 8)
    tokens = torch.arange(3, 43)[None]
    with torch.no_grad():
        found, expected = build(tmp_path)(tokens, torch.arange(40)[None], None), hf(tokens).logits
    assert (found - expected).abs().max() < 2e-5 * expected.abs().max()


@pytest.mark.parametrize("model_type", OF_TRANSFORMER_ENGINE)
def test_without_local_layers_it_is_refused_before_its_weights_are_read(model_type, megatron, tmp_path):
    write_model(model_type, {**SIZES, **OF_TRANSFORMER_ENGINE[model_type]}, tmp_path, 8)
    with pytest.raises(UserError, match=r"^[^\n]*it needs a GPU with Transformer Engine[^\n]*$"):
        build(tmp_path)
