"""DoRA on layers with a bias."""

from posttrain.patches import patch


@patch(
    "dora-bias",
    symptom="the magnitudes of DoRA scale the bias of a layer as well (GPT-2, GPT-NeoX, Qwen2): the paper's and PEFT's "
    "do not, so the exported adapter is another model than the trained one",
    versions={"megatron-bridge": ">=0.6,<0.7"},
)
def unscaled_bias() -> None:
    """Scale the product alone."""
    from megatron.bridge.peft.dora_layers import DoRALinear

    def forward(self, x):
        out, bias, hidden = self.base_linear_forward(x)
        if not self._adapter_enabled:
            return out, bias
        dropout = self.adapter.dropout
        scale = (self.adapter.get_weight_magnitude() / self._get_weight_norm()).view(1, 1, -1)
        added = getattr(self.to_wrap, "bias", None) if bias is None else None  # already in `out`
        added = 0.0 if added is None or not added.numel() else added
        result = scale * (out + self.adapter(hidden.contiguous())) + (1 - scale) * added
        if self.training and getattr(dropout, "p", 0.0) > 0:  # W sees x without dropout
            result = result + (scale - 1) * (self.base_linear_forward(dropout(hidden) - hidden)[0] - added)
        return result, bias

    DoRALinear.forward = forward
