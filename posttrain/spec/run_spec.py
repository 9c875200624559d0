"""What memory and time depend on: a configuration, boiled down to numbers. Changing one gives another plan."""

import math
from dataclasses import dataclass

from omegaconf import DictConfig

from posttrain.spec.shape import Adapters, Shape, config_of


@dataclass(frozen=True)
class Setting:
    """One run on GPUs.

    Attributes:
        adapters: None: all weights are trained.
        precision: bf16, fp32 or fp8.
        transformer_engine: whether the layers are Transformer Engine's.
        world: processes of the run.
        tensor, pipeline, context, expert: model-parallel sizes.
        length: tokens of a row; unpacked, of the rows of the largest micro-batch on average.
        trained: share of the tokens that are trained, at most in any micro-batch.
        squares: mean over tokens of the length of the conversation they are in.
        sequences: conversations in a micro-batch.
        longest: longest conversation of a micro-batch, tokens.
        fused, again: `peft.fused`, `peft.recompute`.
        logits, graph: `trainer.trained_logits_only`, `trainer.cuda_graph`.
    """

    shape: Shape
    adapters: Adapters | None
    precision: str
    transformer_engine: bool
    world: int
    tensor: int
    pipeline: int
    context: int
    expert: int
    sequence_parallel: bool
    distributed_optimizer: bool
    fsdp: bool
    micro_batch: int
    global_batch: int
    length: float
    recompute: str
    optimizer: str
    packing: bool = True
    trained: float = 1.0
    squares: float | None = None
    sequences: int = 1
    longest: int | None = None
    fused: bool = True
    again: bool = True
    dropout: float = 0.0
    logits: bool = True
    graph: bool | None = None

    @classmethod
    def of(cls, cfg: DictConfig, world: int, transformer_engine: bool = True) -> "Setting":
        """Read a checked configuration.

        Args:
            world: processes over all machines.
            transformer_engine: whether it is installed where the run will be.

        Raises:
            UserError: the model's sizes are not known.
        """
        from posttrain.config.instantiate import built
        from posttrain.peft import DoRA

        shape = Shape.of(config_of(built(cfg.model)))
        t, p = cfg.trainer, cfg.parallelism
        adapter = built(cfg.peft) if cfg.peft._target_ else None
        adapters = None
        if adapter:
            kind = "DoRA" if isinstance(adapter, DoRA) else "LoRA"
            adapters = Adapters.of(shape, kind, adapter.rank, adapter.target_modules, transformer_engine)
        wanted = p.sequence_parallel
        if wanted is None:  # as posttrain.train.parallelism.Parallelism.apply
            wanted = transformer_engine or bool(shape.experts)
        name = cfg.precision.name
        return cls(
            shape=shape, adapters=adapters, precision="bf16" if name == "auto" else name,
            transformer_engine=transformer_engine, world=world, tensor=p.tensor_model_parallel_size,
            pipeline=p.pipeline_model_parallel_size, context=p.context_parallel_size,
            expert=p.expert_model_parallel_size, sequence_parallel=bool(wanted),
            distributed_optimizer=p.distributed_optimizer, fsdp=p.fsdp, micro_batch=t.micro_batch_size,
            global_batch=t.global_batch_size, length=t.seq_length, recompute=t.recompute,
            optimizer=cfg.optimizer.optimizer, packing=bool(cfg.data.get("packing", True)),
            fused=bool(adapter and adapter.fused), again=bool(adapter and adapter.recompute),
            dropout=adapter.dropout if adapter else 0.0, logits=t.trained_logits_only, graph=t.cuda_graph,
        )  # fmt: skip

    @property
    def data_parallel(self) -> int:
        """Processes that see different data."""
        return max(1, self.world // (self.tensor * self.pipeline * self.context))

    @property
    def micro_batches(self) -> int:
        """Forward passes of a process in a step."""
        return max(1, self.global_batch // (self.micro_batch * self.data_parallel))

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch that one process holds."""
        return math.ceil(self.micro_batch * self.length / self.context)

    @property
    def width(self) -> int:
        """Bytes of a number in weights and activations."""
        return 4 if self.precision == "fp32" else 2

    @property
    def one_operation(self) -> bool:
        """Whether a layer and its LoRA are one operation (posttrain.ops.fused_lora)."""
        plain = self.adapters is not None and self.adapters.kind == "LoRA" and not self.adapters.canonical
        other_fp8 = self.precision == "fp8" and not self.eight_bit_base
        return plain and self.fused and self.tensor == 1 and not self.dropout and not other_fp8

    @property
    def eight_bit_base(self) -> bool:
        """Whether frozen weights are kept in 8 bits (posttrain.train.trainer.Trainer.eight_bit_base)."""
        a = self.adapters
        lora = a is not None and a.kind == "LoRA" and not a.canonical and self.fused and not self.dropout
        every = lora and {linear.name for linear in self.shape.linears} <= a.sizes.keys()
        return self.precision == "fp8" and every and self.tensor == 1 and not self.shape.experts

    def computed_again(self, linear: str) -> bool:
        """Whether what comes before a linear layer, its norm or activation, is not kept (posttrain.ops.recomputed_norms)."""
        if not (self.one_operation and self.again and self.transformer_engine) or not self.trains(linear):
            return False
        mixture = bool(self.shape.experts) and linear in ("linear_fc1", "linear_fc2")
        return linear != "linear_proj" and not mixture and (linear != "linear_fc2" or self.shape.family.gate == "silu")

    @property
    def trained_logits(self) -> bool:
        """Whether the output layer sees trained tokens alone (posttrain.train.trainer.Trainer.trained_logits_only)."""
        return self.logits and self.tensor == self.context == 1 and not self.shape.softcap

    @property
    def captured(self) -> bool:
        """Whether the step is a CUDA graph (posttrain.train.trainer.Trainer.cuda_graph)."""
        possible = self.transformer_engine and self.packing and self.world == 1
        wanted = self.shape.family.no_cuda_graph is None if self.graph is None else self.graph
        return possible and wanted

    def trains(self, linear: str) -> float:
        """Share of the layers in which the linear layer `linear` is trained or adapted."""
        if self.adapters is None:
            return 1.0
        return self.adapters.sizes.get(linear, (0, 0))[0] / self.shape.layers
