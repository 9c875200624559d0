"""Soft-capped attention of packed rows by FlexAttention: its masks against torch's own, itself against Transformers."""

import pytest
import torch
from gemma2_attention import SOFTCAP, capped_layer, row_of, theirs

# Boundaries of documents, filled up as for a CUDA graph, and tokens of the row.
ROWS = {
    "one document": ([0, 512], 512),
    "short ones": ([0, 3, 130, 131, 300, 300, 300], 300),
    "padding after the last": ([0, 128, 200], 384),
    "ends on blocks": ([0, 128, 256, 512, 512], 512),
    "a long one in the middle": ([0, 60, 700, 768], 768),
}
WINDOWS = [None, 1, 40, 200]
SCALE = 0.25


@pytest.fixture(scope="module")
def ops():
    """(the layer's module, FlexAttention's) once Megatron can be imported here."""
    from posttrain import patches

    patches.apply(patches.Platform("cpu", False))
    from posttrain.ops import attention, capped_attention

    return attention, capped_attention


def build_mask(ops, row: str, window: int | None):
    """The block mask of a row."""
    ends, total = ROWS[row]
    attention, capped = ops
    return capped.build_block_mask(attention.first_visible(torch.tensor(ends, dtype=torch.int32), total, window))


def documents(row: str) -> list[int]:
    """Lengths of a row's documents, that of padding among them."""
    ends, total = ROWS[row]
    lengths = torch.tensor([*ends, total]).diff()
    return lengths[lengths > 0].tolist()


def as_sets(numbers: torch.Tensor, indices: torch.Tensor) -> list[set[int]]:
    """The counted indices of each block."""
    return [set(row[:number].tolist()) for number, row in zip(numbers[0, 0], indices[0, 0], strict=True)]


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("row", ROWS)
def test_block_mask_is_what_torch_makes_of_every_pair(row, window, ops):
    from torch.nn.attention.flex_attention import create_block_mask

    mask = build_mask(ops, row, window)
    total = ROWS[row][1]
    document = torch.repeat_interleave(torch.arange(len(documents(row))), torch.tensor(documents(row)))

    def visible(batch, head, query, key):
        near = query >= key if window is None else (query >= key) & (query - key <= window)
        return near & (document[query] == document[key])

    expected = create_block_mask(visible, None, None, total, total, device="cpu")
    for numbers, indices in (
        ("kv_num_blocks", "kv_indices"),
        ("full_kv_num_blocks", "full_kv_indices"),
        ("q_num_blocks", "q_indices"),
        ("full_q_num_blocks", "full_q_indices"),
    ):
        found = as_sets(getattr(mask, numbers), getattr(mask, indices))
        assert found == as_sets(getattr(expected, numbers), getattr(expected, indices)), numbers
        for tensor in (getattr(mask, numbers), getattr(mask, indices)):
            assert tensor.dtype == torch.int32 and tensor.is_contiguous()
        assert getattr(mask, indices).min() >= 0 and getattr(mask, indices).max() < -(-total // 128)


def random_states(total: int) -> list[torch.Tensor]:
    """Queries [t, 4, 16], keys and values [t, 2, 16], large enough for the cap to matter."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(total, heads, 16, generator=generator) for heads in (4, 2, 2))
    return [(6 * q).requires_grad_(), (6 * k).requires_grad_(), v.requires_grad_()]


@pytest.fixture
def backward_on_cpu(monkeypatch):
    """FlexAttention computes gradients on a CPU as it does in its own tests, but refuses to as long as it is asked."""
    import torch.nn.attention.flex_attention as flex

    monkeypatch.setattr(flex, "_validate_device", lambda query, key, value: None)


@pytest.mark.parametrize("row, window", [("short ones", None), ("short ones", 40), ("padding after the last", 100)])
@pytest.mark.parametrize("way", ["kernel", "written out"])
def test_output_and_gradients_are_those_of_transformers(way, row, window, ops, backward_on_cpu, monkeypatch):
    attention, _ = ops
    ends, total = ROWS[row]
    if way == "written out":
        monkeypatch.setattr(attention, "FUSED_FROM", total + 1)
    layer = capped_layer(attention, 16, window, SCALE)
    packed = row_of(ends)
    states = random_states(total)
    upstream = torch.randn(total, 4, 16, generator=torch.Generator().manual_seed(1))
    expected = theirs(states, documents(row), window, SCALE)
    expected_gradients = torch.autograd.grad(expected, states, upstream)
    found = layer.attend_row(*states, packed, SOFTCAP)
    assert ("posttrain_masks" in vars(packed)) == (way == "kernel")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for gradient, right in zip(torch.autograd.grad(found, states, upstream), expected_gradients, strict=True):
        torch.testing.assert_close(gradient, right, rtol=1e-4, atol=2e-5)


def test_the_cap_of_16_bit_scores_has_tanhs_gradient_score_by_score(ops):
    _, capped = ops
    scores = torch.linspace(-4, 4, 50).reshape(5, 10).requires_grad_()
    by_score = torch.vmap(torch.vmap(capped.approximate_tanh))
    (found,) = torch.autograd.grad(by_score(scores).sum(), scores)
    (expected,) = torch.autograd.grad(torch.tanh(scores).sum(), scores)
    torch.testing.assert_close(found, expected)


def test_a_document_does_not_see_its_neighbours(ops):
    attention, _ = ops
    ends, total = ROWS["short ones"]
    layer = capped_layer(attention, 16, 40, SCALE)
    packed = row_of(ends)
    with torch.no_grad():
        states = [tensor.detach() for tensor in random_states(total)]
        before = layer.attend_row(*states, packed, SOFTCAP)
        for tensor in states:
            tensor[3:130].normal_()
            tensor[131:].normal_()
        after = layer.attend_row(*states, packed, SOFTCAP)
    kept = torch.tensor([0, 1, 2, 130])
    assert torch.equal(before[kept], after[kept]) and not torch.equal(before[3:130], after[3:130])


def test_layers_share_a_rows_masks(ops):
    attention, _ = ops
    packed = row_of([0, 300])
    whole = attention.row_mask(packed, 300, None)
    assert attention.row_mask(packed, 300, None) is whole
    assert attention.row_mask(packed, 300, 40) is not whole
