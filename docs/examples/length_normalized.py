"""Fine-tuning in which every conversation counts the same, however many tokens of it are supervised."""

import numpy as np

from posttrain.objectives import SFT


class LengthNormalized(SFT):
    """The loss is the mean over conversations of the mean over each one's supervised tokens."""

    def weights(self, row: dict[str, np.ndarray]) -> np.ndarray:
        mask = row["loss_mask"].astype(np.float32)
        starts = np.cumsum(row["seq_lens"]) - row["seq_lens"]
        supervised = np.add.reduceat(mask, starts)  # tokens of each conversation
        return mask / np.repeat(np.maximum(supervised, 1), row["seq_lens"])
