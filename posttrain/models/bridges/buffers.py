"""Buffers that old published checkpoints hold beside the weights: kept on export, so that no tensor is lost."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import torch

if TYPE_CHECKING:
    from megatron.bridge.models.conversion.model_bridge import WeightConversionTask


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
        self,
        task: "WeightConversionTask",
        converted_weights_dict: dict[str, torch.Tensor],
        hf_state_dict: Mapping[str, torch.Tensor],
    ) -> dict[str, torch.Tensor]:
        """Add the layer's buffers to its norm's weight, as they are in the source."""
        for name in list(converted_weights_dict):
            if not name.endswith(self.NORM):
                continue
            for end in self.BUFFERS:
                buffer = name.removesuffix(self.NORM) + end
                if buffer in hf_state_dict:
                    converted_weights_dict[buffer] = hf_state_dict[buffer]
        return converted_weights_dict
