"""Random values that do not depend on how the model is divided over processes.

Megatron draws each process's part of a parameter from that process's generator, so another tensor-, pipeline- or
expert-parallel size is another run. Here each parameter is drawn whole, from a generator seeded by the run and the
parameter's name, and each process keeps its part.
"""

import hashlib
import re
from typing import Protocol

import torch
from megatron.core import parallel_state
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import BaseTransformerLayer
from torch.distributed.tensor import DTensor


class Initialise(Protocol):
    """Fills a whole parameter in place."""

    def __call__(self, whole: torch.Tensor, /, *, generator: torch.Generator) -> object: ...


DRAWN_AT_ONCE = 1 << 26  # numbers; the embedding of a 70B is 4 GB in fp32, beside a model that fills the GPU
INTO_RESIDUAL = ("linear_proj.weight", "linear_fc2.weight")  # which Megatron scales by depth


def draw_model(model: list[torch.nn.Module], seed: int) -> None:
    """Fill the matrices of `model` (chunks of this process) in place, as Megatron initialises them.

    Biases and norms are constants in Megatron, and stay as they are.

    Args:
        model: with its adapters, which are left as they are, or without.
        seed: of the run.
    """
    for chunk in model:
        for module in chunk.modules():
            if isinstance(module, BaseTransformerLayer):
                _draw_layer(module, seed)
            elif isinstance(module, LanguageModule):
                _draw_ends(module, seed)


def _draw_layer(layer: BaseTransformerLayer, seed: int) -> None:
    config = layer.config
    for name, parameter in layer.named_parameters():
        if parameter.dim() < 2 or ".adapter." in name:
            continue
        name = name.replace(".to_wrap.", ".")
        initialise = config.init_method
        if any(matrix in name for matrix in INTO_RESIDUAL):
            initialise = config.output_layer_init_method
        whole = whole_name(name, config.num_moe_experts)
        gated = config.gated_linear_unit and "linear_fc1.weight" in name
        pieces = 2 if gated else 1
        draw_part(parameter, divided_by(name), f"{seed}/{layer.layer_number}/{whole}", initialise, pieces)


def _draw_ends(model: LanguageModule, seed: int) -> None:
    """The embeddings and the output layer, of which a tied one is the same where another process holds it."""
    config: TransformerConfig = model.config
    words = "embedding.word_embeddings.weight"
    for name, parameter in model.named_parameters():
        if not name.startswith(("embedding.", "output_layer.")) or parameter.dim() < 2:
            continue
        tied = name == "output_layer.weight" and model.share_embeddings_and_output_weights
        initialise = config.init_method
        if tied or name.startswith("embedding."):
            initialise = config.embedding_init_method
        drawn = words if tied else name
        draw_part(parameter, divided_by(name), f"{seed}/{drawn}", initialise)


@torch.no_grad()
def draw_part(
    parameter: torch.nn.Parameter,
    place: tuple[int, int],
    seed: str,
    initialise: Initialise,
    pieces: int = 1,
    device: torch.device | str | None = None,
) -> None:
    """Fill a parameter, either divided over the processes or not at all.

    Args:
        parameter: of this process.
        place: processes that it may be divided over, and the place of this one among them.
        seed: what its values depend on.
        initialise: fills the whole.
        pieces: matrices that are one parameter along the divided dimension, each divided by itself (gate and up).
        device: where it is drawn, whose kind the values depend on; None: the parameter's own.
    """
    processes, rank = place
    split = -1
    if getattr(parameter, "tensor_model_parallel", False):
        split = getattr(parameter, "partition_dim", -1)
    shape = list(parameter.shape)
    if split >= 0:
        shape[split] *= processes
    whole = torch.empty(shape, dtype=parameter.dtype, device=device or parameter.device)
    draw(whole, seed, initialise)
    if split >= 0:
        parts = []
        for piece in whole.chunk(pieces, dim=split):
            parts.append(piece.chunk(processes, dim=split)[rank])
        whole = torch.cat(parts, dim=split)
    if isinstance(parameter, DTensor):  # Megatron-FSDP's, divided as one row of numbers
        own = whole.view(-1)[own_slice(parameter)]
        parameter.to_local().view(-1).copy_(own)
        return
    parameter.copy_(whole)


def own_slice(shard: DTensor) -> slice:
    """Which of a parameter's numbers, one after the other, this process of Megatron-FSDP has."""
    own: slice = getattr(shard, "megatron_fsdp_slice")  # noqa: B009  (no attribute of the class)
    return own


def draw(whole: torch.Tensor, seed: str, initialise: Initialise) -> None:
    """Fill a tensor of any floating-point format with what is drawn in fp32, a part of its rows at a time."""
    number = int.from_bytes(hashlib.blake2b(seed.encode(), digest_size=7).digest(), "big")
    generator = torch.Generator(whole.device).manual_seed(number)
    rows = max(1, DRAWN_AT_ONCE // whole[0].numel())
    for part in torch.split(whole, rows):
        drawn = torch.empty(part.shape, dtype=torch.float32, device=whole.device)
        initialise(drawn, generator=generator)
        part.copy_(drawn)


def divided_by(name: str) -> tuple[int, int]:
    """Processes that the parameter `name` may be divided over, and the place of this one among them."""
    if ".experts." in name:
        return (
            parallel_state.get_expert_tensor_parallel_world_size(),
            parallel_state.get_expert_tensor_parallel_rank(),
        )
    return parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_tensor_model_parallel_rank()


def whole_name(name: str, experts: int | None) -> str:
    """The parameter's name with an expert's number in the whole model; each process counts its own from 0.

    An adapter that grouped experts share, on all processes the same, has no number.
    """
    here = (experts or 0) // parallel_state.get_expert_model_parallel_world_size()
    first = here * parallel_state.get_expert_model_parallel_rank()
    numbered = r"(?<=local_experts\.)\d+|(?<=\.experts\.linear_fc[12]\.weight)\d+"
    return re.sub(numbered, lambda match: str(first + int(match[0])), name)
