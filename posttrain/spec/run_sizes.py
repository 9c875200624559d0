"""What a run is: what was asked for and what the machine has, and the numbers that follow by counting alone."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from posttrain.spec.epochs import Epoch, planned_steps
from posttrain.spec.parallel_sizes import ParallelSizes
from posttrain.spec.shape import Adapters, Shape
from posttrain.spec.stages import divide_layers, own_stages


@dataclass(frozen=True, kw_only=True)
class RunSizes(ParallelSizes):
    """One run as it was asked for.

    Attributes:
        device: "cpu" or "cuda".
        transformer_engine: whether the layers are Transformer Engine's; on a GPU only.
        shape: the model's sizes; None: its family is not known here, and only Megatron knows them.
        experts: of a layer; 0: a dense model.
        mixture_settings: whether `trainer.megatron` changes the mixture.
        stage_options: what `trainer.megatron` says of the layers that each pipeline stage has; empty: nothing.
        no_cuda_graph: why this model's step is not captured unless that is asked for; None: it is.
        adapter: whether an adapter is trained, else all weights are.
        adapters: its sizes; None: there is none, or `shape` is None.
        every_layer_fused: each linear layer of a dense model is one operation with its adapter.
        precision: bf16, fp32 or fp8.
        sequence_parallel: where there is tensor parallelism, activations between matrices are divided as well.
        overlap, distributed_optimizer, fsdp: as in `parallelism`.
        micro_batch, global_batch: sequences.
        max_steps, epochs, validation_batches: as in `trainer`.
        optimizer: adam or sgd.
        bf16_state: whether Adam's state is in 16 bits (`optimizer=adam_bf16`).
        machines: `launch.nnodes`.
        packing: as in `data`.
        length: tokens of a packed sequence; unpacked, of the rows of the largest micro-batch on average.
        supervised_share: of the tokens, at most in any micro-batch.
        squares: mean over tokens of the length of the conversation they are in.
        sequences: conversations in a micro-batch.
        longest: longest conversation of a micro-batch, tokens.
        fused, recompute_norms, dropout: as in `peft`.
        answers: validation prompts to answer before and after training; 0 without a validation set.
        skip_prompt_logits, graph: `trainer.skip_prompt_logits`, `trainer.cuda_graph`.
        recompute: none, selective or full.
        recompute_open: whether it is left to `parallelism=auto`, by `trainer.recompute=auto`.
        recompute_layers, offload_layers, export, verify, verify_base: as in `trainer`.
    """

    device: str
    transformer_engine: bool
    shape: Shape | None
    experts: int
    mixture_settings: bool
    stage_options: Mapping[str, Any]
    no_cuda_graph: str | None
    adapter: bool
    adapters: Adapters | None
    every_layer_fused: bool
    precision: str
    sequence_parallel: bool
    overlap: bool
    distributed_optimizer: bool
    fsdp: bool
    micro_batch: int
    global_batch: int
    max_steps: int | None
    epochs: float | None
    validation_batches: int | None
    length: float
    recompute: str
    optimizer: str
    recompute_open: bool = False
    recompute_layers: int | None = None
    offload_layers: int | None = None
    bf16_state: bool = False
    machines: int = 1
    packing: bool = True
    supervised_share: float = 1.0
    squares: float | None = None
    sequences: int = 1
    longest: int | None = None
    fused: bool = True
    recompute_norms: bool = True
    dropout: float = 0.0
    answers: int = 0
    skip_prompt_logits: bool = True
    graph: bool | None = None
    export: bool = True
    verify: bool = True
    verify_base: bool | None = None

    @property
    def known_shape(self) -> Shape:
        """The model's sizes, for estimates; a run of a family that is not known has none.

        Raises:
            ValueError: it is one.
        """
        if self.shape is None:
            raise ValueError("the sizes of the model are not known")
        return self.shape

    @property
    def micro_batches(self) -> int:
        """Forward passes of a process in a step."""
        return max(1, self.global_batch // (self.micro_batch * self.data_parallel))

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch that one process holds."""
        return math.ceil(self.micro_batch * self.length / self.context)

    @property
    def shapes_exchanged(self) -> bool:
        """Whether pipeline stages tell each other each micro-batch's shape; Megatron's fixed one is of one full row."""
        return self.pipeline > 1 and (not self.packing or self.micro_batch > 1)

    @cached_property
    def stages(self) -> tuple[int, ...] | None:
        """Layers of each pipeline stage; None: there is one, or they are not known or can't be divided so."""
        if self.shape is None or self.pipeline == 1:
            return None
        if self.stage_options:
            return own_stages(self.stage_options, self.shape.layers, self.pipeline)
        return self.stages_of(self.shape.layers)

    def stages_of(self, layers: int) -> tuple[int, ...] | None:
        """How a model with `layers` is divided over pipeline stages; None: not, or `trainer.megatron` says it.

        The last one has the output layer too, and fewer layers where that makes the longest stage shorter.
        """
        if self.pipeline == 1 or self.stage_options or layers < self.pipeline:
            return None
        output_layer = 1.0  # in layers; of a model whose sizes are not known it is taken for that
        if self.shape is not None:
            parameters = self.shape.hidden * self.shape.vocab
            output_layer = parameters * layers / (self.shape.products - parameters)
        return divide_layers(layers, self.pipeline, output_layer)

    @property
    def stage_layers(self) -> Sequence[float]:
        """Layers of each pipeline stage; the mean where `stages` is None."""
        if self.stages is not None:
            return self.stages
        return (self.known_shape.layers / self.pipeline,) * self.pipeline

    def layers_again(self, stage: int) -> float:
        """Layers of a pipeline stage that are computed again as a whole in the backward pass."""
        layers = self.stage_layers[stage]
        if self.recompute != "full":
            return 0
        if self.recompute_layers is None:
            return layers
        return min(self.recompute_layers, layers)

    @property
    def recomputations(self) -> tuple[str, ...]:
        """The values of `recompute` that `parallelism=auto` may choose, in the order of trying."""
        if self.recompute_open:
            return ("none", "full")
        return (self.recompute,)

    @property
    def share_again(self) -> float:
        """Share of all layers that is computed again."""
        return sum(map(self.layers_again, range(self.pipeline))) / self.known_shape.layers

    def epoch(self, rows: int) -> Epoch:
        """The steps of an epoch of `rows` packed sequences."""
        return Epoch(rows, self.global_batch)

    def steps(self, rows: int | None) -> int | None:
        """Optimizer steps of the whole run; of a part of an epoch, a step that has begun counts.

        Args:
            rows: packed sequences of the training data; None: not counted.

        Returns:
            None where it depends on `rows` and these are not counted.
        """
        epoch = None
        if rows is not None:
            epoch = self.epoch(rows)
        return planned_steps(self.max_steps, self.epochs, epoch)

    def validation_batch(self, rows: int) -> int:
        """Rows of a validation batch: no more than there are, in whole micro-batches of every process."""
        least = self.micro_batch * self.data_parallel
        return min(self.global_batch, max(1, math.ceil(rows / least)) * least)

    def validation_steps(self, rows: int) -> int:
        """Global batches of one validation of `rows` packed sequences."""
        steps = math.ceil(rows / self.validation_batch(rows))
        return min(steps, self.validation_batches or steps)

    @property
    def width(self) -> int:
        """Bytes of a number in weights and activations."""
        return 4 if self.precision == "fp32" else 2

    @property
    def divides_state(self) -> bool:
        """Whether the optimizer's state is divided among data-parallel processes; Megatron has 16 bits there alone."""
        return self.distributed_optimizer or self.bf16_state

    @property
    def kv_heads(self) -> int:
        """Key and value heads of a process of tensor parallelism; 0 where they are not known."""
        if self.shape is None:
            return 0
        return self.shape.groups // self.tensor

    def trains(self, linear: str) -> float:
        """Share of the layers in which the linear layer `linear` is trained or adapted."""
        if self.adapters is None:
            return 1.0
        layers, _ = self.adapters.sizes.get(linear, (0, 0))
        return layers / self.known_shape.layers
