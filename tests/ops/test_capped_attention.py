"""Soft-capped attention of packed rows: what a query sees, the attention written out against Transformers.

Its kernels are in test_elementwise_kernels.py, and on a GPU in test_capped_attention_gpu.py.
"""

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
def attention():
    """The layer's module, once Megatron can be imported here."""
    from posttrain import patches

    patches.apply(patches.Platform("cpu", False))
    from posttrain.ops import attention

    return attention


def documents(row: str) -> list[int]:
    """Lengths of a row's documents, that of padding among them."""
    ends, total = ROWS[row]
    lengths = torch.tensor([*ends, total]).diff()
    return lengths[lengths > 0].tolist()


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("row", ROWS)
def test_ranges_hold_every_visible_pair_and_no_other(row, window, attention):
    ends, total = ROWS[row]
    visible = attention.row_visible(row_of(ends), total, window)
    document = torch.repeat_interleave(torch.arange(len(documents(row))), torch.tensor(documents(row)))
    token = torch.arange(total)
    distance = token[:, None] - token  # of query and key
    expected = (document[:, None] == document) & (distance >= 0)
    if window is not None:
        expected &= distance <= window
    assert torch.equal((token >= visible.first[:, None]) & (distance >= 0), expected)
    assert torch.equal((token[:, None] < visible.last) & (distance >= 0), expected)
    assert visible.first.dtype == visible.last.dtype == torch.int32


def random_states(total: int) -> list[torch.Tensor]:
    """Queries [t, 4, 16], keys and values [t, 2, 16], large enough for the cap to matter."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(total, heads, 16, generator=generator) for heads in (4, 2, 2))
    return [(6 * q).requires_grad_(), (6 * k).requires_grad_(), v.requires_grad_()]


@pytest.mark.parametrize("row, window", [("short ones", None), ("short ones", 40), ("padding after the last", 100)])
def test_output_and_gradients_are_those_of_transformers(row, window, attention):
    ends, total = ROWS[row]
    layer = capped_layer(attention, 16, window, SCALE)
    states = random_states(total)
    upstream = torch.randn(total, 4, 16, generator=torch.Generator().manual_seed(1))
    expected = theirs(states, documents(row), window, SCALE)
    expected_gradients = torch.autograd.grad(expected, states, upstream)
    found = layer.attend_row(*states, row_of(ends), SOFTCAP)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for gradient, right in zip(torch.autograd.grad(found, states, upstream), expected_gradients, strict=True):
        torch.testing.assert_close(gradient, right, rtol=1e-4, atol=2e-5)


def test_a_document_does_not_see_its_neighbours(attention):
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


def test_layers_share_what_a_row_sees(attention):
    packed = row_of([0, 300])
    whole = attention.row_visible(packed, 300, None)
    assert attention.row_visible(packed, 300, None) is whole
    assert attention.row_visible(packed, 300, 40) is not whole
