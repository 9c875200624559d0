"""Buffers that old published checkpoints hold beside the weights: kept on export, so that no tensor is lost."""

from collections.abc import Mapping
from typing import ClassVar

import torch


class KeepsBuffers:
    """Mixin of a MegatronModelBridge whose published checkpoints hold causal masks or rotary frequencies.

    Without them an export that follows the source's shards waits for tensors that never come.

    Attributes:
        NORM: end of the name of a tensor that each layer has once.
        BUFFERS: ends of the buffers' names, in the same layer.
    """

    NORM: ClassVar[str]
    BUFFERS: ClassVar[tuple[str, ...]]

    def maybe_modify_converted_hf_weight(
        self, task, converted_weights_dict: dict[str, torch.Tensor], hf_state_dict: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Add the layer's buffers to its norm's weight, as they are in the source."""
        for name in list(converted_weights_dict):
            if name.endswith(self.NORM):
                keys = [name.removesuffix(self.NORM) + end for end in self.BUFFERS]
                converted_weights_dict |= {key: hf_state_dict[key] for key in keys if key in hf_state_dict}
        return converted_weights_dict
