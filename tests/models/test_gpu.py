"""Every family on a GPU with Transformer Engine's layers in bf16: as near to fp32 as transformers in bf16 is."""

import pytest
from families import FAMILIES, FIELDS, named
from parity import Step, adapter_logits, read_reference, train_step, write_reference, write_step

pytestmark = pytest.mark.gpu
WIDTH = 8  # heads of 64 and more
WIDE = {  # heads of 256
    "llama": {"head_dim": 256},
    "gemma": {"head_dim": 256, "num_key_value_heads": 1},
    "mistral": {"head_dim": 256, "sliding_window": 4},
    "gpt_neox": {"num_attention_heads": 1, "hidden_size": 256},
}


def errors(found: Step, expected: Step) -> tuple[float, float]:
    """Relative errors, in the root of the mean square: of the logits, and of all gradients together."""
    assert found.gradients.keys() == expected.gradients.keys()

    def relative(pairs):
        off = sum((a.float().cpu() - b.float()).square().sum() for a, b in pairs)
        return (off / sum(b.float().square().sum() for _, b in pairs)).sqrt().item()

    gradients = [(found.gradients[name], value) for name, value in expected.gradients.items()]
    return relative([(found.logits, expected.logits)]), relative(gradients)


@pytest.mark.parametrize("family", FAMILIES)
def test_step_in_bf16(family, gpu, tmp_path, record_property):
    compare_step(family, {}, tmp_path, record_property)


@pytest.mark.parametrize(("family", "fields"), FIELDS, ids=named)
def test_a_field_in_bf16(family, fields, gpu, tmp_path, record_property):
    compare_step(family, fields, tmp_path, record_property)


@pytest.mark.parametrize("family", WIDE)
def test_wide_heads_in_bf16(family, gpu, tmp_path, record_property):
    compare_step(family, WIDE[family], tmp_path, record_property)


def compare_step(family, fields, tmp_path, record_property, width=WIDTH):
    """Logits and gradients of a step, as near to fp32 as transformers' in bf16."""
    import torch
    from transformers import AutoModelForCausalLM

    write_reference(family, tmp_path, width, "cuda", **fields)
    expected = read_reference(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, attn_implementation="eager").cuda()
    write_step(theirs, tmp_path / "bf16")
    noise = errors(read_reference(tmp_path / "bf16"), expected)
    found = errors(train_step(tmp_path, gpu=True), expected)
    record_property("bf16", {"transformers": noise, "megatron": found})
    print(f"{family} {fields}: transformers {noise[0]:.4f} {noise[1]:.4f}, Megatron {found[0]:.4f} {found[1]:.4f}")
    assert found[0] < 2 * noise[0] + 0.01
    assert found[1] < 2 * noise[1] + 0.01


@pytest.mark.parametrize("family", FAMILIES)
def test_adapter_in_bf16(family, gpu, tmp_path):
    import torch
    from parity import merged_logits

    write_reference(family, tmp_path, width=WIDTH)
    found = adapter_logits(tmp_path, tmp_path / "adapter", "all-linear", gpu=True)
    merged = merged_logits(tmp_path / "adapter")
    noise = merged_logits(tmp_path / "adapter", torch.bfloat16, "cuda")
    ours, theirs = ((logits.cpu().float() - merged).square().mean().sqrt().item() for logits in (found, noise))
    print(f"{family}: transformers {theirs:.4f}, Megatron {ours:.4f}")
    # The merged weights are rounded to bf16, the adapter's sum here is not: that comes on top.
    assert ours < 2 * theirs + 0.02
