"""Activations of some of a model's layers in the host's memory between their forward and backward passes.

The copies run on a stream of their own, beside the products, from and to page-locked memory. The idea is that of
activation offloading in torchtune and TRL; here it is of chosen layers, spread evenly, so that a copy has the time of
the layers between, and it can be captured in a CUDA graph: streams wait for each other on the device alone, and the
host's memory is the same in every step.
"""

from collections import deque
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from megatron.core.transformer.transformer_block import TransformerBlock
from torch.autograd.graph import saved_tensors_hooks

from posttrain.errors import UserError
from posttrain.models.offloaded_layers import AWAY, SMALLEST, chosen_layers


@dataclass(eq=False)
class Storage:
    """The bytes of one or several saved tensors.

    Attributes:
        host: the copy.
        here: the bytes on the device; None: they are away.
    """

    host: torch.Tensor
    here: torch.Tensor | None


@dataclass(frozen=True)
class Saved:
    """A saved tensor whose storage goes away: a view of it."""

    storage: Storage
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int

    def tensor(self) -> torch.Tensor:
        """The tensor, of a storage that is here."""
        here = self.storage.here
        assert here is not None
        return here.view(self.dtype).as_strided(self.shape, self.stride, self.offset)


@dataclass(eq=False)
class Layer:
    """What a chosen layer keeps.

    Attributes:
        storages: of this forward pass, by the address that they have on the device, as long as they are there.
        hosts: page-locked memory of the layer's storages in their order, from step to step.
        done: the last copy, on the stream of copies.
    """

    storages: dict[int, Storage] = field(default_factory=dict)
    hosts: list[torch.Tensor] = field(default_factory=list)
    done: Any = None


class OffloadedActivations:
    """Takes away what the chosen layers of a block save for their backward passes, and brings it back in time.

    Layers are chosen by `chosen_layers`. Weights, what the block is given for all its layers, and small tensors stay.
    One micro-batch after the other: the next forward pass takes the place of what the one before has saved, whose
    backward pass is refused then.
    """

    def __init__(self, block: TransformerBlock, count: int, smallest: int = SMALLEST) -> None:
        """Register hooks on a block.

        Args:
            block: of all layers.
            count: of layers whose activations go away.
            smallest: bytes of a storage that goes.
        """
        self.count = count
        self.smallest = smallest
        self.layers = [Layer() if chosen else None for chosen in chosen_layers(len(block.layers), count)]
        self.under_way: deque[Layer] = deque()
        self.passes = 0  # forward passes
        self.stay: set[int] = set()  # addresses of storages
        self.current = 0  # the layer that computes
        self.copies: Any = None  # a stream, of the device that the model will be on
        self.hooks: saved_tensors_hooks | None = None
        block.register_forward_pre_hook(self._enter, with_kwargs=True)
        block.register_forward_hook(self._leave, always_call=True)
        for number, layer in enumerate(block.layers):
            layer.register_forward_pre_hook(partial(self._begin, number))

    def _enter(self, block: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the block: from now on it is asked about every tensor that is saved."""
        if not torch.is_grad_enabled():
            return
        self.device = next(block.parameters()).device
        self.streams = torch.get_device_module(self.device)
        if self.copies is None:
            self.copies = self.streams.Stream()
        given = [value for name, value in kwargs.items() if name != "hidden_states"]
        tensors = [*block.parameters(), *block.buffers(), *args[1:], *given]
        self.stay = {t.untyped_storage().data_ptr() for t in tensors if isinstance(t, torch.Tensor)}
        self.under_way.clear()
        self.current = 0  # also of what is saved before the first layer
        self.passes += 1
        for layer in filter(None, self.layers):
            layer.storages.clear()
            layer.done = None
        self.hooks = saved_tensors_hooks(self._pack, self._unpack)
        self.hooks.__enter__()

    def _leave(self, *_: object) -> None:
        """After the block, also where it has failed."""
        if self.hooks is not None:
            self.hooks.__exit__(None, None, None)
            self.hooks = None

    def _begin(self, number: int, *_: object) -> None:
        """Before a layer; not where it is computed again in the backward pass."""
        if self.hooks is None:
            return
        self.current = number
        layer = self.layers[number]
        if layer is None:
            return
        if len(self.under_way) == AWAY:
            self._let_go(self.under_way.popleft())
        self.under_way.append(layer)

    def _let_go(self, layer: Layer) -> None:
        """Free what has been copied, once it has been."""
        self._wait(layer)
        for storage in layer.storages.values():
            storage.here = None

    def _pack(self, tensor: torch.Tensor) -> tuple[int, int, torch.Tensor | Saved]:
        """What autograd keeps in the place of a tensor."""
        layer = self.layers[self.current]
        if layer is None or not self._goes(tensor):
            # Itself only where that makes no circle of references: weights, with what is attached to them.
            return self.passes, self.current, tensor if tensor.is_leaf else tensor.detach()
        whole = tensor.untyped_storage()
        storage = layer.storages.get(whole.data_ptr()) or self._send(layer, whole)
        view = Saved(storage, tensor.dtype, tensor.shape, tensor.stride(), int(tensor.storage_offset()))
        return self.passes, self.current, view

    def _goes(self, tensor: torch.Tensor) -> bool:
        whole = tensor.untyped_storage()
        plain = type(tensor) is torch.Tensor and tensor.device == self.device
        return plain and whole.nbytes() >= self.smallest and whole.data_ptr() not in self.stay

    def _send(self, layer: Layer, whole: torch.UntypedStorage) -> Storage:
        """Begin to copy a storage to the host."""
        here = torch.empty(0, dtype=torch.uint8, device=self.device).set_(whole)
        storage = Storage(self._host(layer, here.numel()), here)
        self.copies.wait_stream(self.streams.current_stream())
        with self.streams.stream(self.copies):
            storage.host.copy_(here, non_blocking=True)
        layer.done = self._marked()
        layer.storages[whole.data_ptr()] = storage
        return storage

    def _host(self, layer: Layer, size: int) -> torch.Tensor:
        """Memory for the layer's next storage: that of the last step, where it is large enough."""
        number = len(layer.storages)
        if number == len(layer.hosts):
            layer.hosts.append(self._page_locked(size))
        elif layer.hosts[number].numel() < size:
            self._release(layer.hosts[number])
            layer.hosts[number] = self._page_locked(size)
        return layer.hosts[number][:size]

    def _page_locked(self, size: int) -> torch.Tensor:
        """Of exactly that size: torch's own pinned memory is of powers of two."""
        try:
            host = torch.empty(size, dtype=torch.uint8)
            if self.device.type == "cuda":
                torch.cuda.check_error(runtime().cudaHostRegister(host.data_ptr(), size, 0))
        except RuntimeError as error:
            raise UserError(
                f"`trainer.offload_layers={self.count}`: the host has no {size / 2**30:.1f} GiB more of page-locked "
                f"memory; choose fewer layers, or trainer.recompute=full ({error})"
            ) from error
        return host

    def _release(self, host: torch.Tensor) -> None:
        self.streams.synchronize()
        if self.device.type == "cuda":
            torch.cuda.check_error(runtime().cudaHostUnregister(host.data_ptr()))

    def _unpack(self, packed: tuple[int, int, torch.Tensor | Saved]) -> torch.Tensor:
        """The tensor, in the backward pass of its layer; the next layer's are sent for meanwhile."""
        made_in, number, saved = packed
        if made_in != self.passes:
            raise UserError(
                f"`trainer.offload_layers={self.count}`: the objective runs the model a second time before the first "
                "one's backward pass, and there is room for one alone; remove it, or use trainer.recompute=full"
            )
        for later in filter(None, self.layers[number + 1 :]):
            later.storages.clear()
        own = self.layers[number]
        if own is not None:
            self._fetch(own)
            self._wait(own)
        next_one = next(filter(None, reversed(self.layers[:number])), None)
        if next_one is not None:
            self._fetch(next_one)
        return saved.tensor() if isinstance(saved, Saved) else saved

    def _fetch(self, layer: Layer) -> None:
        """Begin to copy back what is away."""
        away = [storage for storage in layer.storages.values() if storage.here is None]
        if not away:
            return
        rooms = [torch.empty_like(storage.host, device=self.device) for storage in away]
        self.copies.wait_stream(self.streams.current_stream())
        with self.streams.stream(self.copies):
            for storage, room in zip(away, rooms, strict=True):
                storage.here = room.copy_(storage.host, non_blocking=True)
        layer.done = self._marked()

    def _wait(self, layer: Layer) -> None:
        """Let the device wait for the layer's copies."""
        if layer.done is not None:
            self.streams.current_stream().wait_event(layer.done)
            layer.done = None

    def _marked(self) -> Any:
        """Where the stream of copies is now."""
        event = self.streams.Event()
        event.record(self.copies)
        return event


def runtime() -> Any:
    """CUDA's runtime, as torch has it."""
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def offload(model: list[torch.nn.Module], count: int) -> None:
    """Offload the activations of `count` layers of a model without pipeline stages."""
    for part in model:
        for module in part.modules():
            if isinstance(module, TransformerBlock):
                OffloadedActivations(module, count)
