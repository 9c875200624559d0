"""Layers whose frozen matrices are in 8 bits before they are read."""

import torch
from parity import build, read_reference, run, write_reference


def test_read_and_run(megatron, tmp_path):
    """Every linear layer holds its file's matrix, quantised; logits differ by the rounding of both operands."""
    from posttrain.ops.fp8_linear import EightBitWeight, quantise
    from posttrain.ops.fused_lora import fused_layers
    from posttrain.peft import LoRA

    write_reference("llama", tmp_path)
    _, plain, _ = build(tmp_path)
    exact = {name: weight.detach().clone() for name, weight in plain[0].named_parameters()}
    lora = LoRA(rank=4, alpha=8, target_modules="all-linear").build()
    _, parts, logits = build(tmp_path, lora=lora, eight_bit=True)
    layers = fused_layers(parts)
    assert len(layers) == 4 * plain[0].module.config.num_layers
    for layer in layers:
        assert isinstance(layer.to_wrap.weight, EightBitWeight) and layer.to_wrap.weight.data.dtype == torch.uint8
    names = {module: name for name, module in parts[0].named_modules()}
    for layer in layers:
        numbers, scale = quantise(exact[f"{names[layer]}.weight"])
        found = layer.layer_weight
        assert torch.equal(found.data.view(torch.uint8), numbers.view(torch.uint8)) and torch.equal(found.scale, scale)
    run(parts)
    right = read_reference(tmp_path).logits
    assert ((logits[0] - right).norm() / right.norm()).item() < 0.2  # of large random weights


def test_a_matrix_to_be_divided():
    """It takes no memory, is of the model's format, and its pairs are copied as they are, since none is a NaN."""
    from posttrain.ops.fp8_linear import EightBitWeight

    former = torch.nn.Parameter(torch.zeros(6, 32, dtype=torch.bfloat16))
    weight = EightBitWeight.to_be_divided(former)
    assert weight.untyped_storage().nbytes() == 2
    numbers = torch.arange(256, dtype=torch.uint8)
    finite = numbers[numbers.view(torch.float8_e4m3fn).float().isfinite()]
    pairs = torch.cartesian_prod(finite, finite).view(torch.bfloat16)
    assert finite.numel() == 254 and pairs.isfinite().all()
    weight.data = pairs[: 6 * 16].view(6, 16)
    found = weight.weight
    assert found.data.shape == former.shape and weight.dtype == former.dtype
    assert torch.equal(found.data.view(torch.uint8).view(-1), pairs[: 6 * 16].view(torch.uint8).view(-1))
