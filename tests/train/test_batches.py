"""Order of rows and the counts of a micro-batch."""

from types import SimpleNamespace

import numpy as np
import pytest
from torch.utils.data import DataLoader

from posttrain.data.dataset import PackedDataset
from posttrain.errors import UserError
from posttrain.objectives import SFT
from posttrain.spec.epochs import Epoch
from posttrain.train.batches import Collate, CountingIterator, TrainOrder, ValidationOrder, blank_row


class Rows(list):
    """Rows that are their own index."""


def test_each_epoch_is_a_new_permutation_of_all_rows():
    order = TrainOrder(Rows(range(10)), 5, 6, seed=7, collate_fn=list, blank=None)
    epochs = [[order[i] for i in range(start, start + 10)] for start in (0, 10, 20)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize(("rows", "batch"), [(5, 4), (3, 32), (7, 1), (8, 4), (1, 1), (33, 8)])
def test_epochs_are_those_of_a_loader_that_drops_nothing(rows, batch):
    """Batches as torch's loader makes them of the same permutations; passes as rows over rows."""
    batches, passes = [], []
    for epoch in range(3):
        shuffled = np.random.default_rng([7, epoch]).permutation(rows).tolist()
        for batch_of in DataLoader(Rows(shuffled), batch_size=batch, collate_fn=list):
            batches.append(batch_of)
            passes.append(sum(map(len, batches)) / rows)
    order = TrainOrder(Rows(range(rows)), batch, len(batches), 7, list, blank=None)
    ours = [[order[step * batch + place] for place in range(batch)] for step in range(len(batches))]
    assert [[row for row in one if row is not None] for one in ours] == batches
    assert [one.index(None) for one in ours if None in one] == [len(one) for one in batches if len(one) < batch]
    assert [order.passes(step) for step in range(1, len(batches) + 1)] == pytest.approx(passes, rel=1e-12)
    epoch = Epoch(rows, batch)
    assert epoch.steps * 3 == len(batches) and epoch.last_batch == len(batches[-1])
    assert epoch.trained(len(batches)) == 3 * rows


def test_order_depends_on_seed_and_index_only():
    def order(seed):
        return TrainOrder(Rows(range(10)), 5, 6, seed, list, blank=None)

    first, second = order(7), order(7)
    backwards = [second[i] for i in reversed(range(30))]
    assert [first[i] for i in range(30)] == backwards[::-1]
    assert [order(8)[i] for i in range(30)] != backwards[::-1]


def test_validation_is_filled_up_with_padding():
    blank = blank_row(4, 0)
    order = ValidationOrder(Rows("abc"), 4, blank, list, seed=1)
    assert [order[i] for i in range(3)] == list("abc")
    assert order[3] is blank and not blank["loss_mask"].any()


def test_a_part_of_the_validation_rows_is_a_sample():
    """Rows are packed longest first: the first of them would be the longest conversations."""
    rows = Rows(range(1000))
    order = ValidationOrder(rows, 100, blank_row(4, 0), list, seed=1)
    chosen = [order[i] for i in range(100)]
    assert len(set(chosen)) == 100
    assert abs(np.mean(chosen) - 499.5) < 3 * np.std(rows) / np.sqrt(100)  # of a fair sample
    again = ValidationOrder(rows, 100, blank_row(4, 0), list, seed=1)
    other = ValidationOrder(rows, 100, blank_row(4, 0), list, seed=2)
    assert [again[i] for i in range(100)] == chosen != [other[i] for i in range(100)]


def row(*lengths, supervised=1):
    """A row of sequences whose last `supervised` positions are supervised."""
    total = sum(lengths)
    mask = np.zeros(total, np.uint8)
    for end in np.cumsum(lengths):
        mask[end - supervised : end] = 1
    return {
        "input_ids": np.arange(total, dtype=np.int32),
        "labels": np.arange(1, total + 1, dtype=np.int32),
        "loss_mask": mask,
        "position_ids": np.concatenate([np.arange(n, dtype=np.int32) for n in lengths]),
        "seq_lens": np.array(lengths, np.int32),
    }


SFT_WEIGHTS = SFT().weights


def collate(length=8, weights=SFT_WEIGHTS, **options):
    return Collate(length, 0, weights, **options)


def test_packed_micro_batch():
    batch = collate()([row(3, 2), row(8)])
    assert batch["tokens"].shape == batch["labels"].shape == batch["loss_mask"].shape == (1, 16)
    assert batch["cu_seqlens_q"].tolist() == [0, 3, 5, 8, 16]
    assert batch["max_seqlen"] == 8
    assert int(batch["loss_mask"].sum()) == 3
    assert batch["counts"][:4] == (3, 13, 9 + 4 + 64, 16)


def test_unpacked_micro_batch_is_padded_as_a_whole():
    batch = collate(length=None, multiple=4)([row(3), row(6)])
    assert batch["tokens"].shape == (1, 12)
    assert batch["cu_seqlens_q"].tolist() == [0, 3, 9, 12]


def test_a_micro_batch_of_padding_is_short_where_shapes_may_differ():
    blank = blank_row(2, 0)
    assert collate(pad_blank=False)([blank, blank])["tokens"].shape == (1, 4)
    assert collate(pad_blank=False)([row(3), blank])["tokens"].shape == (1, 16)
    assert collate()([blank, blank])["tokens"].shape == (1, 16)
    assert collate(pad_blank=False, multiple=8)([blank])["tokens"].shape == (1, 8)
    counts = collate(pad_blank=False)([blank, blank])["counts"]
    assert (counts.tokens, counts.supervised_tokens, counts.checksum, counts.padded_tokens) == (0, 0, 0, 4)


def stored(lengths, starts):
    """Rows that hold the conversations of these lengths, from each of `starts` to the next."""
    store = SimpleNamespace(lengths=np.array(lengths))
    return PackedDataset(store, np.arange(len(lengths)), np.array(starts))


def test_rows_of_one_sequence_each_have_no_boundaries():
    assert stored([100, 100, 98], [0, 1, 2, 3]).is_whole(100)
    assert not stored([100, 50, 50], [0, 1, 3]).is_whole(100)  # two share a row
    assert not stored([100, 70, 60], [0, 1, 2, 3]).is_whole(100)  # mostly padding
    whole = collate(whole=True)
    assert whole([row(8), row(7)])["whole_rows"] == 2
    assert collate()([row(8)])["whole_rows"] == 0
    assert collate(length=None, whole=True)([row(8), row(6)])["whole_rows"] == 0  # rows of different lengths


def test_graphs_get_batches_of_one_shape():
    fixed = collate(sequences=6)
    first, second = fixed([row(3, 2), row(8)]), fixed([row(1, 1, 1), row(4, 4)])
    assert first["cu_seqlens_q"].tolist() == [0, 3, 5, 8, 16, 16, 16]
    assert first["cu_seqlens_q"].shape == second["cu_seqlens_q"].shape
    assert first["max_seqlen"] == second["max_seqlen"] == 8


def test_counts_start_again_after_take():
    batches = CountingIterator(iter([collate()([row(3, 2)]), collate()([row(8)])]))
    assert "counts" not in next(batches)
    assert batches.take()[:4] == (2, 5, 13, 8)
    next(batches)
    assert batches.take()[:4] == (1, 8, 64, 8)
    with pytest.raises(StopIteration):
        next(batches)


def test_supervised_positions_are_listed_and_filled_up():
    batch = collate(supervised=5)([row(3, 2), row(8)])
    assert batch["supervised_at"].tolist() == [2, 4, 15, 0, 0]
    assert batch["supervised_mask"].tolist() == [[1, 1, 1, 0, 0]]
    assert collate()([row(3, 2), row(8)])["supervised_at"].tolist() == [2, 4, 15]
    assert collate()([blank_row(8, 0)])["supervised_mask"].tolist() == [[0]]
    with pytest.raises(ValueError, match="more than the 2"):
        collate(supervised=2)([row(3, 2), row(8)])


def test_weights_are_the_objectives():
    """A label counts what the objective says, and the batch the sum of its weights."""

    def by_conversation(packed):
        return packed["loss_mask"] / np.float32(2)

    batch = collate(weights=by_conversation, supervised=6)([row(4, 4, supervised=2)])
    assert batch["loss_mask"].tolist() == [[0, 0, 0.5, 0.5, 0, 0, 0.5, 0.5]]
    assert batch["supervised_mask"].tolist() == [[0.5, 0.5, 0.5, 0.5, 0, 0]]
    assert int(batch["normalizer"]) == 2
    assert batch["counts"].supervised_tokens == 4
    assert int(collate()([row(3, 2), row(8)])["normalizer"]) == 3


def test_weights_sum_to_a_whole_number():
    """They are what a step's loss is divided by, and that is counted."""

    def root(packed):
        return packed["loss_mask"] / np.sqrt(np.float32(packed["loss_mask"].sum()))

    with pytest.raises(UserError, match=r"weights of a micro-batch sum to 1\.7321; .* a whole number"):
        collate(weights=root)([row(8, supervised=3)])
