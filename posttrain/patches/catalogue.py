"""The order in which patches are registered, and so applied."""

# ruff: noqa: F401, I001  (imported for what they register; the order is the point)
from posttrain.patches.startup import imports  # first: nothing of Megatron may have been imported before
from posttrain.patches.startup import dynamo
from posttrain.patches.startup import transformers_imports
from posttrain.patches.startup import compiled_helpers
from posttrain.patches.startup import jit_warmup
from posttrain.patches.startup import results_queue
from posttrain.patches.cpu import hidden_transformer_engine
from posttrain.patches.cpu import torch_cuda
from posttrain.patches.cpu import expert_splits
from posttrain.patches.cpu import fsdp_over_gloo
from posttrain.patches.correctness import async_writer
from posttrain.patches.correctness import distributed_optimizer
from posttrain.patches.correctness import expert_optimizer
from posttrain.patches.correctness import base_weights
from posttrain.patches.correctness import missing_weights
from posttrain.patches.correctness import megatron_fsdp as fsdp_checkpoints
from posttrain.patches.startup import packed_rope  # imports Megatron: after what says where tensors are placed
