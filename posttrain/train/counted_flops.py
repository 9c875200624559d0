"""Floating-point operations of the model as it was built; of one that was not, see posttrain.plan.flops."""

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import get_model_config

from posttrain.plan.flops import ModelFlops
from posttrain.spec.shape import layer_products
from posttrain.utils.gpus import peak_tflops


def count_flops(model: list[MegatronModule], vocabulary: int, frozen: bool, gpus: int) -> ModelFlops:
    """Count the operations of a built Megatron model, of any family.

    Args:
        model: its chunks.
        vocabulary: rows of the output layer.
        frozen: whether the base weights are frozen.
        gpus: that the run has; 0: a CPU.
    """
    config = get_model_config(model[0])
    ffn = config.ffn_hidden_size
    visited = 1
    if config.num_moe_experts:
        ffn = config.moe_ffn_hidden_size or ffn
        visited = config.moe_router_topk
    query = config.num_attention_heads * config.kv_channels
    layer = layer_products(
        hidden=config.hidden_size,
        query=query,
        key=config.num_query_groups * config.kv_channels,
        ffn=ffn,
        gate=config.gated_linear_unit,
        visited=visited,
    )
    peak = None
    if gpus:
        tflops = peak_tflops(torch.cuda.get_device_name())
        if tflops is not None:
            peak = gpus * tflops * 1e12
    head = config.hidden_size * vocabulary
    return ModelFlops(
        weights=config.num_layers * layer + head,
        head=head,
        frozen=frozen,
        attention=config.num_layers * query,
        peak=peak,
    )
