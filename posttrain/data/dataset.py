"""The dataset that the trainer reads: packed sequences with labels, mask and positions."""

import numpy as np

from posttrain.data.store import Store

NEARLY_FULL = 0.95  # of an item's tokens are none of its padding


class PackedDataset:
    """A map-style dataset; item i is one packed sequence.

    Args:
        store: the conversations.
        order: int64[n], indices into `store`.
        starts: int64[items + 1]; item i packs order[starts[i]:starts[i + 1]].
        multiple: each conversation is padded at its end to a multiple of this many tokens,
            untrained; context parallelism cuts every one into equal parts.
        pad_id: the padding token.
    """

    def __init__(
        self,
        store: Store,
        order: np.ndarray,
        starts: np.ndarray,
        multiple: int = 1,
        pad_id: int = 0,
    ) -> None:
        self.store = store
        self.order = order
        self.starts = starts
        self.multiple = multiple
        self.pad_id = pad_id

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Return one packed sequence of k conversations with n tokens in all.

        Returns:
            input_ids int32[n]; labels int32[n], the next token within the conversation; loss_mask
            uint8[n], 1 where the label is supervised; position_ids int32[n] from 0 in each
            conversation; seq_lens int32[k].
        """
        if not 0 <= index < len(self):
            raise IndexError(index)
        all_ids, all_masks = [], []
        for conversation in self.order[self.starts[index] : self.starts[index + 1]]:
            ids, mask = self._padded(conversation)
            all_ids.append(ids)
            all_masks.append(mask)
        lengths = np.array(list(map(len, all_ids)), dtype=np.int32)
        ids = np.concatenate(all_ids)
        mask = np.concatenate(all_masks)
        ends = np.cumsum(lengths)
        labels = np.roll(ids, -1)
        supervised = np.roll(mask, -1)
        labels[ends - 1] = ids[ends - 1]  # a conversation's last token predicts nothing
        supervised[ends - 1] = 0
        starts = np.repeat(ends - lengths, lengths).astype(np.int32)
        positions = np.arange(len(ids), dtype=np.int32) - starts
        return {
            "input_ids": ids,
            "labels": labels,
            "loss_mask": supervised,
            "position_ids": positions,
            "seq_lens": lengths,
        }

    def most_supervised(self) -> int:
        """Supervised tokens of the packed sequence that has most of them."""
        return int(np.add.reduceat(self.store.supervised[self.order], self.starts[:-1]).max())

    def is_whole(self, length: int) -> bool:
        """Whether every item is one conversation, or one window of text, of nearly `length` tokens.

        Attention without boundaries is faster then; but it computes what is padding too.
        """
        if np.diff(self.starts).max() > 1:
            return False
        return bool(self.store.lengths[self.order].mean() >= NEARLY_FULL * length)

    def _padded(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids and mask of a conversation, padded to a multiple."""
        ids, mask = self.store[index]
        padding = -len(ids) % self.multiple
        if not padding:
            return ids, mask
        return np.pad(ids, (0, padding), constant_values=self.pad_id), np.pad(mask, (0, padding))
