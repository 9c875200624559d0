"""What a GPU does of a model's frozen products and its attention alone, kept busy: the ceiling of a LoRA step's speed.

    python bench/ceiling.py llama3_8b qwen3_8b gemma_7b [--fp8] [--tokens 4096] [--seconds 4]

For each model of conf/model: the matrix products of all layers and of the output layer, forward and with respect to
their inputs (with --fp8 the layers' in E4M3, operands quantised beforehand), and causal attention of one row by the
fastest of torch's kernels; each by itself, then all of it in turn as in a step, replayed as CUDA graphs. No adapter,
norm, activation, rotation, loss or optimizer. Numbers are random. Power and clock are means while it runs, after a
second that doesn't count: a card at its power limit lowers its clock, so that a short run is faster than a training.
"""

import argparse
import itertools
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from posttrain.config.composition import compose
from posttrain.errors import UserError
from posttrain.models.hf import plain
from posttrain.ops.fp8_linear import Weight, eight_bit_product, quantise
from posttrain.plan.flops import ModelFlops
from posttrain.spec.shape import Shape
from posttrain.utils import stop

HEAD = "| model | work | ms a row | tok/s, if that were all | TFLOP/s | W | MHz |"
SETTLE = 1.0  # seconds until power and clock are steady
KERNELS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]  # in order of preference


@dataclass
class Sensors:
    """Power (W) and clock (MHz) of the GPU, sampled by nvidia-smi while the context lasts."""

    power: list[float] = field(default_factory=list)
    clock: list[float] = field(default_factory=list)

    def __enter__(self) -> "Sensors":
        """Start to sample."""
        uuid = torch.cuda.get_device_properties(0).uuid
        fields = ["--query-gpu=power.draw,clocks.sm", "--format=csv,noheader,nounits", "--loop-ms=100"]
        command = ["nvidia-smi", f"--id=GPU-{uuid}", *fields]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.reader = threading.Thread(target=self._read)
        self.reader.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Stop."""
        self.process.terminate()
        self.reader.join()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            power, clock = line.split(",")
            self.power.append(float(power))
            self.clock.append(float(clock))


@dataclass
class Captured:
    """A graph, and the work that it was captured of, whose tensors it reads and writes."""

    graph: torch.cuda.CUDAGraph
    work: Callable[[], object]

    @classmethod
    def of(cls, work: Callable[[], object]) -> "Captured":
        """Capture `work`, after a run that compiles and allocates."""
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            work()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        return cls(graph, work)


def product(tokens: int, inputs: int, outputs: int, fp8: bool) -> Callable[[], object]:
    """A frozen product [tokens, inputs] -> [tokens, outputs], and that of its gradient."""
    weight = torch.randn(outputs, inputs, device="cuda", dtype=torch.bfloat16) * 0.02
    x = torch.randn(tokens, inputs, device="cuda", dtype=torch.bfloat16)
    upstream = torch.randn(tokens, outputs, device="cuda", dtype=torch.bfloat16)
    y, gradient = torch.empty_like(upstream), torch.empty_like(x)
    if not fp8:
        frozen = Weight(weight)
        backward = frozen.gradient_product()
        return lambda: (frozen.product(x, y), backward(upstream, gradient))
    pairs = []
    for left, right, out in ((x, weight, y), (upstream, weight.t().contiguous(), gradient)):
        pairs.append((*quantise(left), *quantise(right), out))

    def eight_bit() -> None:
        for left, left_scale, right, right_scale, out in pairs:
            eight_bit_product(left, left_scale, right.t(), right_scale, torch.bfloat16, out)

    return eight_bit


def in_turn(works: Sequence[Callable[[], object]]) -> Callable[[], object]:
    """One after the other."""

    def every() -> None:
        for work in works:
            work()

    return every


def heads_of(count: int, shape: Shape, tokens: int) -> torch.Tensor:
    """Random queries, keys or values [1, count, tokens, features of a head]."""
    return torch.randn(1, count, tokens, shape.head_width, device="cuda", dtype=torch.bfloat16, requires_grad=True)


def attention(shape: Shape, tokens: int) -> Callable[[], object]:
    """Causal attention of a row, forward and backward."""
    query, key, value = (heads_of(count, shape, tokens) for count in (shape.heads, shape.groups, shape.groups))
    upstream = torch.randn_like(query)
    grouped = shape.groups < shape.heads

    def attend() -> None:
        with sdpa_kernel(KERNELS, set_priority=True):
            out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped)
            torch.autograd.grad(out, (query, key, value), upstream)

    return attend


def keep_busy(graphs: Sequence[Captured], seconds: float) -> tuple[float, Sensors]:
    """Replay the graphs in order, again and again: seconds of a round (median), and what the sensors said."""
    rounds = []
    sensors = Sensors()
    begin = time.monotonic()
    while time.monotonic() < begin + SETTLE:
        replay(graphs)
    with sensors:
        while time.monotonic() < begin + SETTLE + seconds:
            rounds.append(replay(graphs))
    return statistics.median(rounds), sensors


def replay(graphs: Sequence[Captured]) -> float:
    """Seconds that the graphs take."""
    begin = time.perf_counter()
    for captured in graphs:
        captured.graph.replay()
    torch.cuda.synchronize()
    return time.perf_counter() - begin


def shape_of(model: str) -> Shape:
    """Of a model in conf/model."""
    shape = Shape.from_config(plain(compose([f"model={model}"]).model.architecture))
    if shape.experts or shape.score_softcap:
        raise UserError(f"{model}: mixtures of experts and capped scores are not products and attention alone")
    return shape


def measure(model: str, given: argparse.Namespace) -> None:
    """Print a model's lines."""
    shape = shape_of(model)
    tokens = given.tokens
    layer = Captured.of(in_turn([product(tokens, one.inputs, one.outputs, given.fp8) for one in shape.linears]))
    head = Captured.of(product(tokens, shape.hidden, shape.vocab, fp8=False))
    attend = Captured.of(attention(shape, tokens))
    flops = ModelFlops.from_shape(shape, frozen=True)
    attended = flops.step(0, tokens**2)
    of_head = 4 * flops.head * tokens
    of_layers = 4 * flops.weights * tokens - of_head
    layers = shape.layers
    together = list(itertools.chain.from_iterable([(layer, attend)] * layers))
    for name, graphs, operations in (
        ("products of the layers", [layer] * layers, of_layers),
        ("output layer", [head], of_head),
        ("attention", [attend] * layers, attended),
        ("all", [*together, head], of_layers + of_head + attended),
    ):
        seconds, sensors = keep_busy(graphs, given.seconds)
        cells = [model, name, f"{seconds * 1000:.1f}", f"{tokens / seconds:,.0f}", f"{operations / seconds / 1e12:.0f}"]
        cells += [f"{statistics.mean(sensors.power):.0f}", f"{statistics.mean(sensors.clock):.0f}"]
        print("| " + " | ".join(cells) + " |", flush=True)


@stop.command
def main() -> None:
    """Measure models."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("models", nargs="+", help="names in conf/model")
    options.add_argument("--fp8", action="store_true", help="the layers' products in 8 bits")
    options.add_argument("--tokens", type=int, default=4096, help="of a row")
    options.add_argument("--seconds", type=float, default=4.0, help="of each line, after one that doesn't count")
    given = options.parse_args()
    if given.seconds <= 0:
        options.error(f"--seconds {given.seconds:g}: must be more than 0")
    if not torch.cuda.is_available():
        raise UserError("bench/ceiling.py requires a GPU")
    print(torch.cuda.get_device_name(), torch.__version__)
    print(HEAD)
    print("|---|---|---|---|---|---|---|")
    for model in given.models:
        measure(model, given)


if __name__ == "__main__":
    main()
