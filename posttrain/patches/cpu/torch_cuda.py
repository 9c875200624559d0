"""Run Megatron on a CPU: CUDA queries answered, CUDA placements mapped to the CPU, RNG state from the CPU generator.

Only for processes without a GPU. Everything is a plain function replacement rather than a TorchFunctionMode, so that
no Python runs per tensor operation in the training step.
"""

import functools
from collections.abc import Callable

from posttrain.patches.registry import Kind, on_cpu, patch, replace

VERSIONS = {"megatron-core": ">=0.19,<0.20", "torch": ">=2.9,<2.13"}


class _Event:
    """torch.cuda.Event of a device that is always done."""

    def __init__(self, *args: object, **kwargs: object) -> None: ...

    def record(self, *args: object) -> None: ...

    def wait(self, *args: object) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: "_Event") -> float:
        return 0.0


class _Stream:
    """torch.cuda.Stream of a device with a single, synchronous queue; a context manager like torch.cuda.stream()."""

    cuda_stream = 0

    def __init__(self, *args: object, **kwargs: object) -> None: ...

    def wait_stream(self, *args: object) -> None: ...

    def wait_event(self, *args: object) -> None: ...

    def record_event(self, *args: object) -> _Event:
        return _Event()

    def synchronize(self) -> None: ...

    def __enter__(self) -> "_Stream":
        return self

    def __exit__(self, *args: object) -> None: ...


def cpu_device(device: object) -> object:
    """Map what names a CUDA device (string, index, torch.device) to the CPU; leave the rest as it is."""
    import torch

    if isinstance(device, bool) or device is None:
        return device
    if isinstance(device, int) or str(device).startswith("cuda"):
        return torch.device("cpu")
    return device


@patch(
    "cpu-cuda-queries",
    kind=Kind.CPU,
    symptom="Megatron asks torch.cuda for devices, streams, events and memory everywhere: 'Megatron requires CUDA.'",
    versions=VERSIONS,
    when=on_cpu,
)
def cuda_queries() -> None:
    """Answer torch.cuda's queries for a machine whose one device is the CPU."""
    import psutil
    import torch

    class Properties:
        name = "cpu"
        major = minor = 0
        multi_processor_count = 1
        total_memory = psutil.virtual_memory().total

    def used_memory() -> int:
        rss: int = psutil.Process().memory_info().rss
        return rss

    # A function for each name: Dynamo keeps rules by object and refuses one that has two names.
    for name in ("set_device", "synchronize", "empty_cache", "reset_peak_memory_stats", "manual_seed_all", "init"):
        replace(torch.cuda, **{name: lambda *args, **kwargs: None})
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"):
        replace(torch.cuda, **{name: lambda *args, **kwargs: used_memory()})
    cpu = torch.device("cpu")
    replace(
        torch.cuda,
        is_available=lambda: True,
        is_current_stream_capturing=lambda: False,
        is_bf16_supported=lambda *args, **kwargs: True,
        current_device=lambda: cpu,
        device_count=lambda: 1,
        get_device_name=lambda *args, **kwargs: "cpu",
        get_device_capability=lambda *args, **kwargs: (0, 0),
        get_device_properties=lambda *args, **kwargs: Properties(),
        memory_stats=lambda *args, **kwargs: {},
        Stream=_Stream,
        stream=_Stream,
        Event=_Event,
        current_stream=lambda *args, **kwargs: _Stream(),
        default_stream=lambda *args, **kwargs: _Stream(),
    )
    replace(torch.cuda.nvtx, range_push=lambda *args: None, range_pop=lambda *args: None)
    # DataLoader asks this for a device to pin memory on and to place workers by.
    replace(torch.accelerator, is_available=lambda: False)


@patch(
    "cpu-placement",
    kind=Kind.CPU,
    symptom="Megatron places tensors with device='cuda', .cuda() and .to('cuda'), and asserts on their type() string",
    versions=VERSIONS,
    when=on_cpu,
)
def placement() -> None:
    """Map CUDA placements to the CPU in factory functions, .to and .cuda; report CUDA type names."""
    import torch
    from torch.utils._device import _device_constructors

    def mapped[T](function: Callable[..., T]) -> Callable[..., T]:
        @functools.wraps(function)
        def call(*args: object, **kwargs: object) -> T:
            if kwargs.get("device") is not None:
                kwargs["device"] = cpu_device(kwargs["device"])
            kwargs.pop("pin_memory", None)  # needs a driver; asked for by libraries that find CUDA "available"
            return function(*args, **kwargs)

        return call

    factories = (
        "tensor as_tensor empty zeros ones full rand randn randint randperm arange linspace eye "
        "empty_like zeros_like ones_like full_like rand_like randn_like empty_strided"
    )
    # `with torch.device(...)` knows the factories by identity and notes them once: it must note the plain ones, or
    # transformers, which loads on the meta device, takes uninitialised memory for rotary frequencies.
    _device_constructors()
    for name in factories.split():
        replace(torch, **{name: mapped(getattr(torch, name))})
    for name in ("new_empty", "new_zeros", "new_ones", "new_full", "new_tensor"):
        replace(torch.Tensor, **{name: mapped(getattr(torch.Tensor, name))})

    plain_to: Callable[..., torch.Tensor] = torch.Tensor.to
    plain_type: Callable[..., object] = torch.Tensor.type

    @functools.wraps(plain_to)
    def to(self: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        if args and not isinstance(args[0], (torch.dtype, torch.Tensor)):
            args = (cpu_device(args[0]), *args[1:])
        if "device" in kwargs:
            kwargs["device"] = cpu_device(kwargs["device"])
        return plain_to(self, *args, **kwargs)

    @functools.wraps(plain_type)
    def type_(self: torch.Tensor, *args: object, **kwargs: object) -> object:
        name_or_tensor = plain_type(self, *args, **kwargs)
        if isinstance(name_or_tensor, str):
            return name_or_tensor.replace("torch.", "torch.cuda.", 1)
        return name_or_tensor

    replace(
        torch.Tensor,
        to=to,
        type=type_,
        cuda=lambda self, *args, **kwargs: self,
        pin_memory=lambda self, *args, **kwargs: self,
        record_stream=lambda self, *args, **kwargs: None,
    )
    replace(torch.nn.Module, cuda=lambda self, *args, **kwargs: self)


@patch(
    "cpu-rng",
    kind=Kind.CPU,
    symptom="Megatron's RNG tracker forks and restores the CUDA generator's state",
    versions=VERSIONS,
    when=on_cpu,
)
def rng() -> None:
    """Let the CPU's generator stand for the device's, in torch.cuda and in Megatron's tracker."""
    import megatron.core.tensor_parallel.random as tracker
    import torch

    def get_state(*args: object, **kwargs: object) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(state: torch.Tensor, *args: object, **kwargs: object) -> None:
        torch.set_rng_state(state)

    def seed_cpu(seed: int) -> torch.Generator:  # torch.manual_seed itself would have two names
        return torch.manual_seed(seed)

    for module in (torch.cuda, torch.cuda.random):
        replace(module, get_rng_state=get_state, set_rng_state=set_state, manual_seed=seed_cpu)
    replace(tracker, _get_cuda_rng_state=get_state, _set_cuda_rng_state=set_state)
