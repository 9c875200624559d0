"""What is measured: shapes, batches, and which side takes part. No torch here."""

from dataclasses import dataclass

LLAMA = {"model_type": "llama", "max_position_embeddings": 8192, "rope_theta": 5e5, "use_cache": False}
SHAPES = {
    "1b": LLAMA | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
                   "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True},
    "8b": LLAMA | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
                   "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False},
    "135m": LLAMA | {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
                     "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True},
}  # fmt: skip
MODELS = {"1b": "llama32_1b", "8b": "llama3_8b", "135m": "smollm2_135m"}
RANK = 16


@dataclass(frozen=True)
class Row:
    """One line of the table: the same work for every side.

    Attributes:
        name: what `--rows` selects.
        shape: key of SHAPES.
        micro, accumulation: sequences of a micro-batch, and micro-batches of a step.
        length: tokens of a sequence.
        full: all weights are trained; else LoRA of rank 16 on all linear layers.
        fp8: 8-bit products.
        sides: who takes part.
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
    def tokens(self) -> int:
        """Of a step, where no sequence has padding."""
        return self.micro * self.accumulation * self.length

    def operations(self) -> float:
        """Floating-point operations of a step of full-length sequences; see posttrain/flops.py."""
        from posttrain.flops import Model

        s = SHAPES[self.shape]
        head = s["hidden_size"] // s["num_attention_heads"]
        attention = s["hidden_size"] * head * (2 * s["num_attention_heads"] + 2 * s["num_key_value_heads"])
        layer = attention + 3 * s["hidden_size"] * s["intermediate_size"]
        model = Model(
            weights=s["num_hidden_layers"] * layer + s["hidden_size"] * s["vocab_size"], frozen=not self.full,
            attention=s["num_hidden_layers"] * s["hidden_size"], peak=None,
        )  # fmt: skip
        return model.step(self.tokens, self.tokens * self.length)


ROWS = (
    Row("1b-1x4", "1b", 1, 4, ("posttrain", "posttrain-full-length", "bridge", "hf", "liger", "unsloth")),
    Row("8b-1x2", "8b", 1, 2, ("posttrain", "bridge", "liger", "unsloth")),
    Row("8b-1x2-fp8", "8b", 1, 2, ("posttrain", "bridge"), fp8=True),
    Row("1b-4x1", "1b", 4, 1, ("posttrain", "bridge", "liger", "unsloth")),
    Row("1b-full-1x4", "1b", 1, 4, ("posttrain", "bridge"), full=True),
    Row("135m-8x1", "135m", 8, 1, ("posttrain", "bridge", "liger", "unsloth"), length=1024),
)
