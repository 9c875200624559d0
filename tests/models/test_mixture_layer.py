"""A mixture's grouped products against Transformers' layer and upstream's experts one by one, in fp32."""

from functools import partial

import pytest

HIDDEN, INNER, TOKENS, RANK, SCALE = 32, 24, 40, 4, 0.5
# Transformers' layer, experts, experts of a token, whether the chosen experts' weights sum to one.
CASES = {
    "mixtral": ("mixtral", 4, 2, True),
    "qwen3_moe": ("qwen3_moe", 8, 3, True),
    "qwen3_moe, weights as they are": ("qwen3_moe", 8, 3, False),
    "one expert": ("qwen3_moe", 4, 1, False),
}


@pytest.fixture(scope="module")
def torch(megatron):
    """Torch, with Megatron set up for a CPU."""
    import torch

    return torch


def reference_block(torch, family, experts, chosen, normalised):
    """A random layer of Transformers'. No token chooses the last expert."""
    from transformers.models.mixtral.configuration_mixtral import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
    from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    common = {"hidden_size": HIDDEN, "num_experts_per_tok": chosen, "hidden_act": "silu"}
    if family == "mixtral":
        config = MixtralConfig(intermediate_size=INNER, num_local_experts=experts, **common)
        block = MixtralSparseMoeBlock(config)
    else:
        more = {"moe_intermediate_size": INNER, "num_experts": experts, "norm_topk_prob": normalised}
        config = Qwen3MoeConfig(**more, **common)
        block = Qwen3MoeSparseMoeBlock(config)
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    with torch.no_grad():
        block.gate.weight[-1] = 0
        block.gate.weight[-1, 0] = -100  # of inputs whose first number is 1
    return block


def inputs(torch):
    x = torch.randn(TOKENS, 1, HIDDEN, generator=torch.Generator().manual_seed(1))
    x[..., 0] = 1
    return x


def adapters(torch):
    """A and B of both matrices."""
    generator = torch.Generator().manual_seed(2)
    shapes = [(RANK, HIDDEN), (2 * INNER, RANK), (RANK, INNER), (HIDDEN, RANK)]
    return [torch.randn(shape, generator=generator).mul(0.3).requires_grad_() for shape in shapes]


def our_layer(torch, block, experts, chosen, normalised, separate=False, eight_bit=False, **sizes):
    """The same layer in Megatron: grouped products, or upstream's experts one by one; `sizes`: how it is divided."""
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.moe.experts import GroupedMLPSubmodules, SequentialMLP
    from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
    from megatron.core.transformer.transformer_config import TransformerConfig

    from posttrain.models.mixture_layer import GroupedExperts, GroupedMixture

    class Grouped(torch.nn.Module):
        """Parameters of Transformer Engine's GroupedLinear, which is not there on a CPU."""

        def __init__(self, num_gemms, inputs, outputs, **options):
            super().__init__()
            self.num_gemms = num_gemms
            for number in range(num_gemms):
                self.register_parameter(f"weight{number}", torch.nn.Parameter(torch.empty(outputs, inputs)))

    config = TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=4,
        ffn_hidden_size=INNER,
        num_moe_experts=experts,
        moe_ffn_hidden_size=INNER,
        moe_router_topk=chosen,
        moe_router_load_balancing_type="none",
        moe_router_pre_softmax=not normalised,
        moe_token_dispatcher_type="alltoall",
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        use_cpu_initialization=True,
        **sizes,
    )
    if separate:
        parts = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
        layer = MoELayer(config, MoESubmodules(experts=partial(SequentialMLP, submodules=parts)))
    else:
        parts = GroupedMLPSubmodules(linear_fc1=Grouped, linear_fc2=Grouped)
        grouped = partial(GroupedExperts, submodules=parts, eight_bit=eight_bit)
        layer = GroupedMixture(config, MoESubmodules(experts=grouped))
    with torch.no_grad():
        layer.router.weight.copy_(block.gate.weight)
        for number, whole in enumerate(layer.local_expert_indices):
            pair = layer.experts
            name = f"weight{number}"
            if separate:
                pair = layer.experts.local_experts[number]
                name = "weight"
            getattr(pair.linear_fc1, name).copy_(block.experts.gate_up_proj[whole])
            getattr(pair.linear_fc2, name).copy_(block.experts.down_proj[whole])
    layer.experts.requires_grad_(False)
    return layer


def adapt(torch, layer, pairs):
    """Put shared adapters with these values on the grouped experts."""
    from posttrain.ops.fused_lora import FusedLoRALinear

    for name, (a, b) in zip(("linear_fc1", "linear_fc2"), (pairs[:2], pairs[2:]), strict=True):
        adapter = torch.nn.Module()
        adapter.linear_in, adapter.linear_out = torch.nn.Module(), torch.nn.Module()
        adapter.linear_in.weight, adapter.linear_out.weight = torch.nn.Parameter(a), torch.nn.Parameter(b)
        adapter.alpha, adapter.dim = SCALE * RANK, RANK
        setattr(layer.experts, name, FusedLoRALinear(getattr(layer.experts, name), adapter))
    first, second = layer.experts.linear_fc1.adapter, layer.experts.linear_fc2.adapter
    return [part.weight for pair in (first, second) for part in (pair.linear_in, pair.linear_out)]


def gradients(torch, y, *tensors):
    """Of a loss that weighs all outputs differently."""
    weights = torch.arange(y.numel(), dtype=y.dtype).view_as(y) / y.numel()
    return torch.autograd.grad((y.sin() * weights).sum(), tensors)


def assert_close(found, exact):
    """Each tensor within 1e-5 of the other's norm."""
    for one, other in zip(found, exact, strict=True):
        assert ((one - other).norm() / other.norm()).item() < 1e-5


@pytest.mark.parametrize("case", CASES)
def test_layer_equals_transformers(case, torch):
    block = reference_block(torch, *CASES[case])
    layer = our_layer(torch, block, *CASES[case][1:])
    x = inputs(torch).requires_grad_()
    y, bias = layer(x)
    expected = block(x)
    assert bias is None
    assert layer.router(x)[1].sum(0)[-1] == 0  # the last expert has no token
    found = gradients(torch, y, x, layer.router.weight)
    exact = gradients(torch, expected, x, block.gate.weight)
    assert_close([y, *found], [expected, *exact])


@pytest.mark.parametrize("case", CASES)
def test_layer_equals_experts_one_by_one(case, torch):
    block = reference_block(torch, *CASES[case])
    results = []
    for separate in (False, True):
        layer = our_layer(torch, block, *CASES[case][1:], separate=separate)
        x = inputs(torch).requires_grad_()
        y, _ = layer(x)
        results.append([y, *gradients(torch, y, x, layer.router.weight)])
    assert_close(*results)


@pytest.mark.parametrize("case", CASES)
def test_shared_adapters_equal_those_added_to_each_expert(case, torch):
    block = reference_block(torch, *CASES[case])
    pairs = adapters(torch)
    x = inputs(torch).requires_grad_()
    merged = {
        "experts.gate_up_proj": block.experts.gate_up_proj + SCALE * pairs[1] @ pairs[0],
        "experts.down_proj": block.experts.down_proj + SCALE * pairs[3] @ pairs[2],
        "gate.weight": block.gate.weight,
    }
    expected = torch.func.functional_call(block, merged, (x,))
    exact = gradients(torch, expected, x, block.gate.weight, *pairs)
    layer = our_layer(torch, block, *CASES[case][1:])
    ours = adapt(torch, layer, [pair.detach().clone() for pair in pairs])
    y, _ = layer(x)
    assert_close([y, *gradients(torch, y, x, layer.router.weight, *ours)], [expected, *exact])


def test_disabled_adapters_add_nothing(torch):
    block = reference_block(torch, *CASES["mixtral"])
    layer = our_layer(torch, block, *CASES["mixtral"][1:])
    adapt(torch, layer, [pair.detach() for pair in adapters(torch)])
    for linear in (layer.experts.linear_fc1, layer.experts.linear_fc2):
        linear.disable_adapter_layers()
    x = inputs(torch)
    assert_close([layer(x)[0]], [block(x)])


def test_kept_for_the_backward_pass(torch):
    """Of the rows of all experts the first matrix's products alone."""
    block = reference_block(torch, *CASES["mixtral"])
    layer = our_layer(torch, block, *CASES["mixtral"][1:])
    adapt(torch, layer, [pair.detach() for pair in adapters(torch)])
    x = inputs(torch).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        layer(x)
    rows = [tuple(tensor.shape) for tensor in kept if tensor.dim() == 2 and tensor.size(0) == 2 * TOKENS]
    assert rows == [(2 * TOKENS, 2 * INNER)]


def test_weights_that_got_memory_of_their_own(torch):
    """Loaded by assignment, not by copying: they are used."""
    block = reference_block(torch, *CASES["mixtral"])
    layer = our_layer(torch, block, *CASES["mixtral"][1:])
    for number in range(4):
        weight = getattr(layer.experts.linear_fc2, f"weight{number}")
        weight.data = 2 * weight.data
    x = inputs(torch)
    assert_close([layer(x)[0]], [2 * block(x)])


def test_eight_bit_experts(torch):
    """Output and the input's gradient differ by the rounding of both operands of each product."""
    block = reference_block(torch, *CASES["qwen3_moe"])
    layer = our_layer(torch, block, *CASES["qwen3_moe"][1:], eight_bit=True).bfloat16().float()
    layer.router.weight.data.copy_(block.gate.weight)
    assert all(weight.data.dtype == torch.uint8 for weight in layer.experts.parameters())
    x = inputs(torch).requires_grad_()
    y, _ = layer(x)
    expected = block(x)
    upstream = torch.randn_like(y)
    (found,), (exact,) = torch.autograd.grad(y, x, upstream), torch.autograd.grad(expected, x, upstream)
    assert ((y - expected).norm() / expected.norm()).item() < 2**-3.5
    assert ((found - exact).norm() / exact.norm()).item() < 2**-3.5
