"""How tensor parallelism divides a layer, and what its processes exchange.

With sequence parallelism (arXiv 2205.05198) the undivided side of a layer holds a part of the tokens on each process:
before a product the parts are gathered, or after it the processes' sums are scattered. Where the GPUs read each other's
memory, the parts are exchanged one by one while the product of another part runs (Wang et al. 2023, "Overlap
communication with dependent computation via decomposition", ASPLOS), by the functions of torch's symmetric memory that
its own asynchronous tensor parallelism is made of; elsewhere, whole and by themselves.
"""

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _coalescing_manager

# (a part of the tokens, which of all tokens they are) -> None
type Consume = Callable[[torch.Tensor, slice], None]
# (which of all tokens, where to write their results) -> None
type Produce = Callable[[slice, torch.Tensor], None]


@dataclass(frozen=True)
class Division:
    """How a layer is divided.

    Attributes:
        group: of the processes; None: the layer is whole.
        sequence: whether the undivided side's tokens are divided.
        overlap: whether those are exchanged part by part beside the products.
    """

    group: dist.ProcessGroup | None = None
    sequence: bool = False
    overlap: bool = False

    @property
    def of_tokens(self) -> dist.ProcessGroup | None:
        """The processes that have a part of the undivided side's tokens each; None: each has all."""
        return self.group if self.sequence else None

    @property
    def parts(self) -> int:
        """How many parts the undivided side's tokens are in."""
        return self.of_tokens.size() if self.of_tokens else 1

    def each_part(self, own: torch.Tensor, consume: Consume) -> None:
        """Call `consume` until it had all tokens.

        Args:
            own: [t/n, k], this process's tokens; [t, k] where they aren't divided.
            consume: may be called on another stream, and so writes only to what exists already.
        """
        tokens = own.size(0)
        group = self.of_tokens
        if group is None:
            return consume(own, slice(0, tokens))
        own = own.contiguous()
        if not self.overlap:
            (whole,) = gather([own], group)
            return consume(whole, slice(0, whole.size(0)))
        from torch.distributed._symmetric_memory import _pipelined_all_gather_and_consume

        keep_workspace(group, own.nbytes)
        arrived = own.new_empty(tokens * self.parts, own.size(1))

        def consume_of(part: torch.Tensor, process: int) -> None:
            consume(part, slice(process * tokens, (process + 1) * tokens))

        _pipelined_all_gather_and_consume(own, consume_of, arrived, group.group_name, ag_out_needed=False)
        return None

    def sums(self, produce: Produce, features: int, beside: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Sums over the processes: of what `produce` writes for all tokens, and of `beside`.

        Args:
            produce: writes [.., features], as `consume` of `each_part`.
            features: how many.
            beside: [t, r], which may be overwritten.

        Returns:
            [t/n, features] and [t/n, r]; of all t tokens where they aren't divided.
        """
        tokens = beside.size(0)
        if self.of_tokens and self.overlap:
            return overlapped_sums(self.of_tokens, produce, features, beside)
        partial = beside.new_empty(tokens, features)
        produce(slice(0, tokens), partial)
        if self.group is None:
            return partial, beside
        if self.sequence:
            partial, beside = reduce_scatter([partial, beside], self.group)
            return partial, beside
        with together(self.group, partial.device):
            dist.all_reduce(partial, group=self.group)
            dist.all_reduce(beside, group=self.group)
        return partial, beside

    def sum(self, partial: torch.Tensor) -> torch.Tensor:
        """The sum over the processes of [t, r], which may be overwritten; as `sums` gives it."""
        if self.group is None:
            return partial
        if self.sequence:
            return reduce_scatter([partial], self.group)[0]
        dist.all_reduce(partial, group=self.group)
        return partial


def overlapped_sums(
    group: dist.ProcessGroup, produce: Produce, features: int, beside: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `Division.sums`; a part's results and its part of `beside` travel together, one after the other."""
    from torch.distributed._symmetric_memory import _pipelined_produce_and_all2all

    count = group.size()
    tokens = beside.size(0) // count
    ends = tokens * features
    partials = beside.new_empty(count, ends + tokens * beside.size(1))
    keep_workspace(group, 2 * partials[0].nbytes)

    def produce_for(process: int, out: torch.Tensor) -> None:
        rows = slice(process * tokens, (process + 1) * tokens)
        out = out.view(-1)
        produce(rows, out[:ends].view(tokens, features))
        out[ends:].view(tokens, -1).copy_(beside[rows])

    _pipelined_produce_and_all2all(produce_for, partials, group.group_name)
    results = partials[:, :ends].view(count, tokens, features)
    return results.sum(0), partials[:, ends:].view(count, tokens, -1).sum(0)


WHOLE = Division()
_WORKSPACES: dict[tuple[str, int], object] = {}


def keep_workspace(group: dist.ProcessGroup, size: int) -> None:
    """Have torch's workspace of the group be of `size` bytes at least.

    One that a larger one takes the place of is kept: the captured step may copy from it.
    """
    from torch.distributed._symmetric_memory import get_symm_mem_workspace

    handle = get_symm_mem_workspace(group.group_name, size)
    _WORKSPACES[group.group_name, handle.buffer_size] = handle


@cache
def read_each_other(group: dist.ProcessGroup) -> bool:
    """Whether the group's GPUs are of one host and can read each other's memory; every process of it asks."""
    device = torch.cuda.current_device()
    own = (socket.gethostname(), device)
    places = gather_objects(own, group)
    visible = range(torch.cuda.device_count())
    able = len(set(places)) == len(places)
    for host, other in places:
        able &= host == own[0] and other in visible
        able = able and (other == device or torch.cuda.can_device_access_peer(device, other))
    return all(gather_objects(able, group))


def gather_objects[T](own: T, group: dist.ProcessGroup) -> list[T]:
    """Each process's."""
    found: list[T] = [own] * group.size()
    dist.all_gather_object(found, own, group=group)
    return found


@contextmanager
def together(group: dist.ProcessGroup, device: torch.device) -> Iterator[None]:
    """Communicate in one operation what is asked for inside, which must be of one kind."""
    if device.type != "cuda":  # Gloo has no such operation
        yield
        return
    with _coalescing_manager(group):
        yield


def gather(own: list[torch.Tensor], group: dist.ProcessGroup) -> list[torch.Tensor]:
    """[k, ...] of each process -> [n k, ...], for each tensor."""
    size = group.size()
    whole = []
    for tensor in own:
        whole.append(tensor.new_empty(tensor.size(0) * size, *tensor.shape[1:]))
    with together(group, own[0].device):
        for tensor, result in zip(own, whole, strict=True):
            dist.all_gather_into_tensor(result, tensor, group=group)
    return whole


def reduce_scatter(partial: list[torch.Tensor], group: dist.ProcessGroup) -> list[torch.Tensor]:
    """[n k, ...] of each process -> own [k, ...] of the sum, for each tensor."""
    size = group.size()
    sums = []
    for tensor in partial:
        sums.append(tensor.new_empty(tensor.size(0) // size, *tensor.shape[1:]))
    with together(group, partial[0].device):
        for tensor, result in zip(partial, sums, strict=True):
            dist.reduce_scatter_tensor(result, tensor.contiguous(), group=group)
    return sums
