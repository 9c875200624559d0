"""Training that continues from a PEFT adapter: its weights put into Megatron's adapters."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file

from posttrain.errors import UserError
from posttrain.models.hf_adapter import WEIGHTS
from posttrain.peft.magnitudes import MAGNITUDE, B, dora_layers_of

if TYPE_CHECKING:
    from megatron.bridge import AutoBridge

MOST = 10_000_000  # adapter tensors of one process, far from any model's
type Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Origins:
    """Where each element of an exported adapter comes from.

    Attributes:
        own: the A and B of this process.
        first: number of the first of them; no two processes have the same, exact in fp64.
        number: tensor's name -> for each element the number of its parameter.
        row, column: tensor's name -> for each element its place there.
    """

    own: list[torch.nn.Parameter]
    first: int
    number: Tensors
    row: Tensors
    column: Tensors

    @classmethod
    def trace(cls, bridge: "AutoBridge", parts: list[torch.nn.Module]) -> "Origins":
        """Ask the bridge's export, once for each kind of number."""
        own = adapters_of(parts)
        first = MOST * torch.distributed.get_rank()
        return cls(
            own=own,
            first=first,
            number=_export_marked(bridge, parts, own, lambda index, shape: torch.full(shape, float(first + index))),
            row=_export_marked(bridge, parts, own, lambda _, shape: torch.arange(shape[0])[:, None].expand(shape)),
            column=_export_marked(bridge, parts, own, lambda _, shape: torch.arange(shape[1]).expand(shape)),
        )

    def parameter(self, number: float) -> torch.nn.Parameter | None:
        """The parameter with that number; None: another process's."""
        index = int(number) - self.first
        return self.own[index] if 0 <= index < len(self.own) else None


def load(bridge: "AutoBridge", parts: list[torch.nn.Module], directory: Path) -> None:
    """Fill the adapters of `parts` with those of the PEFT directory; a collective call.

    How the bridge names, cuts and gathers adapters is asked of its export: once with each element holding the number
    of its parameter, once its row, once its column. So whatever the export can write can be read.

    Raises:
        UserError: the adapter has other modules or another rank, or matrices of its own where Megatron's adapters share
            one.
    """
    # The embedding that the adapter may bring is the model's (HFModel.vocabulary).
    saved = {name: tensor for name, tensor in load_file(directory / WEIGHTS).items() if ".lora_" in name}
    origins = Origins.trace(bridge, parts)
    _check_names(saved, origins, directory)
    for name, numbers in origins.number.items():
        for number in numbers.unique().tolist():
            parameter = origins.parameter(number)
            if parameter is None:
                continue
            here = numbers == number
            rows = origins.row[name][here].long().to(parameter.device)
            columns = origins.column[name][here].long().to(parameter.device)
            parameter.data[rows, columns] = saved[name][here].to(parameter.device, parameter.dtype)
    for name, tensor in _export(bridge, parts).items():
        if not tensor.equal(saved[name].to(tensor.dtype)):
            raise UserError(
                f"{directory}: {name} shares a matrix with others in this run and differs from theirs; name the "
                "modules in Hugging Face's words: peft.target_modules=[q_proj,k_proj,v_proj,o_proj,...]"
            )
    load_magnitudes(parts, origins, saved)


def _check_names(saved: Tensors, origins: Origins, directory: Path) -> None:
    """See that the file has the adapters of this run, in the same shapes."""
    settings = f"{directory}: set peft.target_modules as it was trained with"
    matrices = {name for name in saved if "magnitude" not in name}
    unmatched = sorted(matrices ^ origins.number.keys())
    if unmatched:
        holder = "the adapter" if unmatched[0] in saved else "this run"
        raise UserError(f"{settings}; {unmatched[0]} is in {holder} alone")
    for name, numbers in origins.number.items():
        if saved[name].shape != numbers.shape:
            raise UserError(f"{settings}; {name} is {list(saved[name].shape)}, in this run {list(numbers.shape)}")


def load_magnitudes(parts: list[torch.nn.Module], origins: Origins, saved: Tensors) -> None:
    """Fill DoRA's magnitudes: they lie as the rows of B do (see `load` for the arguments)."""
    by_b = {id(layer.adapter.linear_out.weight): layer.adapter for layer in dora_layers_of(parts)}
    if not by_b:
        return
    for name, numbers in origins.number.items():
        if not name.endswith(B):
            continue
        values = saved[name.removesuffix(B) + MAGNITUDE].flatten()
        for number in numbers[:, 0].unique().tolist():
            parameter = origins.parameter(number)
            if parameter is None:
                continue
            adapter = by_b[id(parameter)]
            target = adapter.weight_magnitude.data
            if adapter.input_is_parallel:  # B is divided, the magnitudes are whole
                target.copy_(values)
                continue
            here = numbers[:, 0] == number
            rows = origins.row[name][:, 0][here].long().to(target.device)
            target[rows] = values[here].to(target.device, target.dtype)


def adapters_of(parts: list[torch.nn.Module]) -> list[torch.nn.Parameter]:
    """The A and B of this process."""
    adapters = []
    for part in parts:
        for name, parameter in part.named_parameters():
            if ".adapter." in name and name.endswith(("linear_in.weight", "linear_out.weight")):
                adapters.append(parameter)
    return adapters


def _export(bridge: "AutoBridge", parts: list[torch.nn.Module]) -> Tensors:
    """The adapters under their names in a PEFT file."""
    weights = bridge.export_adapter_weights(parts, cpu=True, show_progress=False)
    return {f"base_model.model.{name}": weight.clone() for name, weight in weights}


def _export_marked(
    bridge: "AutoBridge",
    parts: list[torch.nn.Module],
    own: list[torch.nn.Parameter],
    mark: Callable[[int, torch.Size], torch.Tensor],
) -> Tensors:
    """The export while each parameter holds `mark(index, shape)` in fp64."""
    weights = [parameter.data for parameter in own]
    try:
        for index, parameter in enumerate(own):
            parameter.data = mark(index, parameter.shape).double().contiguous().to(parameter.device)
        return _export(bridge, parts)
    finally:
        for parameter, data in zip(own, weights, strict=True):
            parameter.data = data
