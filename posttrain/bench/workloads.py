"""What is measured: shapes, batches, and who takes part. Imports no torch."""

from dataclasses import dataclass
from typing import Any

from posttrain.plan.flops import ModelFlops
from posttrain.spec.shape import Shape

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "max_position_embeddings": 8192,
    "rope_theta": 5e5,
    "use_cache": False,
}
SHAPES: dict[str, dict[str, Any]] = {
    "1b": LLAMA
    | {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "8b": LLAMA
    | {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
    },
    "135m": LLAMA
    | {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
}
MODELS = {"1b": "llama32_1b", "8b": "llama3_8b", "135m": "smollm2_135m"}  # files of conf/model
RANK = 16


@dataclass(frozen=True)
class Workload:
    """One row of the table: the same work for every side.

    Attributes:
        name: what `--rows` selects.
        shape: key of SHAPES.
        micro: sequences of a micro-batch.
        accumulation: micro-batches of a step.
        sides: who takes part.
        length: tokens of a sequence.
        full: all weights are trained; else LoRA of rank 16 on all linear layers.
        fp8: 8-bit products.
    """

    name: str
    shape: str
    micro: int
    accumulation: int
    sides: tuple[str, ...]
    length: int = 4096
    full: bool = False
    fp8: bool = False

    @property
    def global_batch_size(self) -> int:
        """Sequences of a step."""
        return self.micro * self.accumulation

    @property
    def tokens(self) -> int:
        """Tokens of a step, where no sequence has padding."""
        return self.global_batch_size * self.length

    def operations(self) -> float:
        """Floating-point operations of a step of full-length sequences; see posttrain/plan/flops.py."""
        model = ModelFlops.from_shape(Shape.from_config(SHAPES[self.shape]), frozen=not self.full)
        return model.step(self.tokens, self.tokens * self.length)


WORKLOADS = (
    Workload(
        "1b-1x4",
        "1b",
        1,
        4,
        ("posttrain", "posttrain-full-length", "bridge", "hf", "liger", "unsloth"),
    ),
    Workload("8b-1x2", "8b", 1, 2, ("posttrain", "bridge", "liger", "unsloth")),
    Workload("8b-1x2-fp8", "8b", 1, 2, ("posttrain", "bridge"), fp8=True),
    Workload("1b-4x1", "1b", 4, 1, ("posttrain", "bridge", "liger", "unsloth")),
    Workload("1b-full-1x4", "1b", 1, 4, ("posttrain", "bridge"), full=True),
    Workload("135m-8x1", "135m", 8, 1, ("posttrain", "bridge", "liger", "unsloth"), length=1024),
)
