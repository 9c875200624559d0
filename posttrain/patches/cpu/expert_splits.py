"""What mixtures of experts lack on a CPU."""

from posttrain.patches.registry import Kind, on_cpu, patch, replace


@patch(
    "cpu-expert-splits",
    kind=Kind.CPU,
    symptom="expert parallelism hands gloo's all_to_all tensors for lengths: they become arrays when they leave a GPU",
    versions={"megatron-core": ">=0.19,<0.20"},
    when=on_cpu,
)
def return_splits_as_arrays() -> None:
    """Make arrays of them on a CPU too."""
    import torch
    from megatron.core.transformer.moe import token_dispatcher

    plain = token_dispatcher.maybe_move_tensor_to_cpu

    def move(tensor: object, as_numpy: bool = False, record_stream: bool = False) -> object:
        if as_numpy and torch.is_tensor(tensor) and not tensor.is_cuda:
            return tensor.numpy()
        return plain(tensor, as_numpy, record_stream)

    replace(token_dispatcher, maybe_move_tensor_to_cpu=move)
