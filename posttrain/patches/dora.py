"""DoRA on layers with a bias, and on layers divided by their input."""

from posttrain.patches import patch

VERSIONS = {"megatron-bridge": ">=0.6,<0.7"}


@patch(
    "dora-bias",
    symptom="the magnitudes of DoRA scale the bias of a layer as well (GPT-2, GPT-NeoX, Qwen2): the paper's and PEFT's "
    "do not, so the exported adapter is another model than the trained one",
    versions=VERSIONS,
)
def unscaled_bias() -> None:
    """Scale the product alone."""
    from megatron.bridge.peft.dora_layers import DoRALinear

    def forward(self, x):
        out, bias, hidden = self.base_linear_forward(x)
        if not self._adapter_enabled:
            return out, bias
        dropout = self.adapter.dropout
        scale = (
            self.adapter.get_weight_magnitude() / self._get_weight_norm()
        )  # [out]; an expert's input is [tokens, in]
        added = getattr(self.to_wrap, "bias", None) if bias is None else None  # already in `out`
        added = 0.0 if added is None or not added.numel() else added
        result = scale * (out + self.adapter(hidden.contiguous())) + (1 - scale) * added
        if self.training and getattr(dropout, "p", 0.0) > 0:  # W sees x without dropout
            result = result + (scale - 1) * (self.base_linear_forward(dropout(hidden) - hidden)[0] - added)
        return result, bias

    DoRALinear.forward = forward


@patch(
    "dora-norm",
    symptom="with tensor parallelism the norms of a matrix divided by its input (linear_proj, linear_fc2) are those of "
    "each process's part, so the processes scale the same output differently and drift apart; and the gradient's "
    "norm lacks most magnitudes",
    versions=VERSIONS,
)
def whole_norm() -> None:
    """Sum squares over the processes; mark magnitudes as divided, or gradients to be summed over sequence parts."""
    import torch
    from megatron.bridge.peft.dora_layers import DoRALinear, ParallelLinearDoRAAdapter
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region as gather
    from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes

    @torch.no_grad()
    def norm(self):
        adapter = self.adapter
        a, b = adapter.linear_in.weight, adapter.linear_out.weight
        divided = parallel_state.get_tensor_model_parallel_world_size() > 1 and not adapter.is_expert
        if divided and adapter.input_is_parallel:
            b = gather(b.T).T
        elif divided:
            a = gather(a.T).T
        weight = self.to_wrap.weight + self.scaling * b @ a  # [out or its part, in or its part]
        lengths = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32)
        if divided and adapter.input_is_parallel:
            squares = lengths.square()
            torch.distributed.all_reduce(squares, group=parallel_state.get_tensor_model_parallel_group())
            lengths = squares.sqrt()
        return lengths.to(weight.dtype)

    init = ParallelLinearDoRAAdapter.init_weight_magnitude

    def init_weight_magnitude(self, value):
        init(self, value)
        if self.is_expert:
            return
        if self.input_is_parallel:
            self.weight_magnitude.sequence_parallel = self.config.sequence_parallel
        else:  # divided: counted on every process in the gradient's norm
            set_tensor_model_parallel_attributes(self.weight_magnitude, True, 0, 1)

    DoRALinear._get_weight_norm = norm
    ParallelLinearDoRAAdapter.init_weight_magnitude = init_weight_magnitude
