"""Training that continues from a PEFT adapter: its weights put into Megatron's adapters."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from posttrain.errors import UserError
from posttrain.models.hf_adapter import WEIGHTS

MOST = 10_000_000  # adapter tensors of one process, far from any model's


def load(bridge: Any, parts: list[torch.nn.Module], directory: Path) -> None:
    """Fill the adapters of `parts` with those of the PEFT directory; a collective call.

    How the bridge names, cuts and gathers adapters is asked of its export: once with each element holding the number
    of its parameter, once its row, once its column. So whatever the export can write can be read.

    Raises:
        UserError: the adapter has other modules or another rank, or matrices of its own where Megatron's adapters share
            one.
    """
    from safetensors.torch import load_file

    # The embedding that the adapter may bring is the model's (HFModel.vocabulary).
    wanted = {name: tensor for name, tensor in load_file(directory / WEIGHTS).items() if ".lora_" in name}
    own = adapters(parts)
    first = MOST * torch.distributed.get_rank()  # numbers no two processes share, exact in fp64
    number = traced(bridge, parts, own, lambda index, shape: torch.full(shape, float(first + index)))
    row = traced(bridge, parts, own, lambda index, shape: torch.arange(shape[0])[:, None].expand(shape))
    column = traced(bridge, parts, own, lambda index, shape: torch.arange(shape[1]).expand(shape))
    settings = f"{directory}: set peft.target_modules as it was trained with"
    if odd := sorted({name for name in wanted if "magnitude" not in name} ^ number.keys()):
        raise UserError(f"{settings}; {odd[0]} is in {'the adapter' if odd[0] in wanted else 'this run'} alone")
    for name, numbers in number.items():
        if wanted[name].shape != numbers.shape:
            raise UserError(f"{settings}; {name} is {list(wanted[name].shape)}, in this run {list(numbers.shape)}")
        for found in numbers.unique().tolist():
            if not 0 <= found - first < len(own):
                continue  # another process's
            parameter, here = own[int(found) - first], numbers == found
            rows, columns = (place[name][here].long().to(parameter.device) for place in (row, column))
            parameter.data[rows, columns] = wanted[name][here].to(parameter.device, parameter.dtype)
    differing = [name for name, t in exported(bridge, parts).items() if not t.equal(wanted[name].to(t.dtype))]
    if differing:
        raise UserError(
            f"{directory}: {differing[0]} shares a matrix with others in this run and differs from theirs; name the "
            "modules in Hugging Face's words: peft.target_modules=[q_proj,k_proj,v_proj,o_proj,...]"
        )
    load_magnitudes(bridge, parts, own, first, number, row, wanted)


def load_magnitudes(bridge, parts, own, first, number, row, wanted) -> None:
    """Fill DoRA's magnitudes: they lie as the rows of B do (see `load` for the arguments)."""
    from megatron.bridge.peft.dora_layers import DoRALinear

    layers = [module for part in parts for module in part.modules() if isinstance(module, DoRALinear)]
    of_b = {id(layer.adapter.linear_out.weight): layer.adapter for layer in layers}
    for name in (name for name in number if layers and name.endswith(".lora_B.weight")):
        values = wanted[name.replace(".lora_B.weight", ".lora_magnitude_vector")].flatten()
        for found in number[name][:, 0].unique().tolist():
            if not 0 <= found - first < len(own):
                continue
            adapter, here = of_b[id(own[int(found) - first])], number[name][:, 0] == found
            target = adapter.weight_magnitude.data
            if adapter.input_is_parallel:  # B is divided, the magnitudes are whole
                target.copy_(values)
            else:
                target[row[name][:, 0][here].long().to(target.device)] = values[here].to(target.device, target.dtype)


def adapters(parts: list[torch.nn.Module]) -> list[torch.nn.Parameter]:
    """The A and B of this process."""
    ends = ("linear_in.weight", "linear_out.weight")
    return [p for part in parts for name, p in part.named_parameters() if ".adapter." in name and name.endswith(ends)]


def exported(bridge: Any, parts: list[torch.nn.Module]) -> dict[str, torch.Tensor]:
    """The adapters under their names in a PEFT file."""
    weights = bridge.export_adapter_weights(parts, cpu=True, show_progress=False)
    return {f"base_model.model.{name}": weight.clone() for name, weight in weights}


def traced(
    bridge: Any, parts: list[torch.nn.Module], own: list[torch.nn.Parameter], mark: Callable[[int, Any], torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The export while each parameter holds `mark(index, shape)` in fp64."""
    kept = [parameter.data for parameter in own]
    try:
        for index, parameter in enumerate(own):
            parameter.data = mark(index, parameter.shape).double().contiguous().to(parameter.device)
        return exported(bridge, parts)
    finally:
        for parameter, data in zip(own, kept, strict=True):
            parameter.data = data
