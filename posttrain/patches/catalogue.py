"""The order in which patches are registered, and so applied."""

# ruff: noqa: F401, I001  (imported for what they register; the order is the point)
from posttrain.patches import imports  # first: nothing of Megatron may have been imported before
from posttrain.patches import dynamo
from posttrain.patches import transformers_imports
from posttrain.patches import helpers
from posttrain.patches import results_queue
from posttrain.patches import async_writer
from posttrain.patches import cpu
from posttrain.patches import local_layers
from posttrain.patches import distributed_optimizer
from posttrain.patches import base_weights
from posttrain.patches import canonical_lora
from posttrain.patches import dora
from posttrain.patches import experts
from posttrain.patches import rope
from posttrain.patches import warmup
