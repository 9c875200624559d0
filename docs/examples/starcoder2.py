"""StarCoder2 as a model of the config group: conf/model/starcoder2_3b.yaml names this class."""

from dataclasses import dataclass

from posttrain.models import HFModel


@dataclass
class Starcoder2(HFModel):
    """A Hugging Face model whose bridge is ours; Megatron is imported when the bridge is asked for, not before."""

    def bridge(self):
        """Return the AutoBridge, once our bridge is registered."""
        import starcoder2_bridge  # noqa: F401

        return super().bridge()
