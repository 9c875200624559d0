"""How good a model is: loss and perplexity on any data, scored answers, and lm-eval's tasks."""

from posttrain.evaluate.scores import ExactMatch

__all__ = ["ExactMatch"]
