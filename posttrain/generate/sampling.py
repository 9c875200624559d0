"""How the next token of an answer is chosen. No torch here: a mistake is known before anything is loaded."""

from dataclasses import dataclass

from posttrain.errors import UserError

MAX_NEW_TOKENS = 1 << 20
# Divided by less, logits of a float32 can overflow; what is drawn then is the most likely token anyway.
LEAST_TEMPERATURE, MOST_TEMPERATURE = 1e-5, 1e3
LEAST_PENALTY, MOST_PENALTY = 1e-2, 1e2


@dataclass(frozen=True)
class Sampling:
    """Every setting that decides which tokens an answer has; none is left to a model's generation_config.json.

    Attributes:
        max_new_tokens: most tokens of an answer.
        temperature: 0 takes the most likely token each time.
        top_p: sample from the most likely tokens of this total.
        top_k: sample from this many tokens; 0: from all.
        repetition_penalty: above 1 makes tokens that occur already, in the prompt too, less likely.
        seed: of the sampling; each batch has its own draw.

    Raises:
        UserError: a setting would have no effect, or is too small to compute with.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if 0 < self.temperature < LEAST_TEMPERATURE:
            raise UserError(
                f"temperature={self.temperature:g}: must be 0, the most likely token each time, "
                f"or at least {LEAST_TEMPERATURE:g}"
            )
        for name, value, off in (("top_p", self.top_p, 1.0), ("top_k", self.top_k, 0)):
            if self.temperature == 0 and value != off:
                raise UserError(
                    f"{name}={value:g}: has no effect at a temperature of 0, where the most likely token is taken each "
                    "time; set the temperature too"
                )
