"""Logits of a live Megatron model, however it is divided over processes."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from megatron.core.utils import unwrap_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROMPTS = (
    "The quick brown fox jumps over the lazy dog. What is the capital of France, and how many people live there?",
    "def fibonacci(n):\n    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)\n\nprint(fibonacci(10))  # 55\n",
    "Übermorgen kostet es 1,234.50 €; 東京は日本の首都です。 Сколько это будет? ¿Dónde está la biblioteca?",
)
LENGTH = 32  # tokens of each; three of them divide by every usual tensor-parallel size


def encode_prompts(
    tokenizer: "PreTrainedTokenizerBase", vocabulary: int, conversation: list[int] | None = None
) -> torch.Tensor:
    """The fixed prompts [3 or 4, 32]: text cut or repeated to its length; ids outside the vocabulary are wrapped.

    Args:
        tokenizer: of the model.
        vocabulary: rows of its embedding.
        conversation: ids of a fourth prompt.
    """
    prompts = [tokenizer(text, add_special_tokens=False).input_ids for text in PROMPTS]
    if conversation:
        prompts.append(conversation)
    rows = [(ids * (LENGTH // len(ids) + 1))[:LENGTH] for ids in prompts]
    return torch.tensor(rows) % vocabulary


@torch.no_grad()
def compute_logits(parts: list[torch.nn.Module], tokens: torch.Tensor) -> torch.Tensor:
    """Logits [n, length, vocabulary as padded] of `tokens` [n, length], fp32 on the CPU; a collective call.

    The sequences are packed in one row, as in training.
    """
    count, length = tokens.shape
    device = next(parts[0].parameters()).device
    ends = torch.arange(0, count * length + 1, length, dtype=torch.int32, device=device)
    packed = PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends, max_seqlen_q=length, max_seqlen_kv=length
    )
    positions = torch.arange(length, device=device).repeat(count)[None]
    row = tokens.reshape(1, -1).to(device)

    def forward_step(iterator: object, model: torch.nn.Module) -> tuple[torch.Tensor, Callable[..., torch.Tensor]]:
        output = model(row, positions, None, packed_seq_params=packed)
        return output, lambda output, non_loss_data: output

    plain = unwrap_model(parts)
    training = [part.training for part in plain]
    for part in plain:
        part.eval()
    try:
        outputs = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=None,
            model=plain,
            num_microbatches=1,
            seq_length=count * length,
            micro_batch_size=1,
            forward_only=True,
            collect_non_loss_data=True,
        )
    finally:
        for part, was in zip(plain, training, strict=True):
            part.train(was)
    last = parallel_state.is_pipeline_last_stage()
    whole = torch.empty(count, length, 0, device=device)
    if last:
        whole = gather_from_tensor_model_parallel_region(outputs[0]).float().reshape(count, length, -1).contiguous()
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        size = torch.tensor([whole.size(-1)], device=device)
        source = parallel_state.get_pipeline_model_parallel_last_rank()
        group = parallel_state.get_pipeline_model_parallel_group()
        torch.distributed.broadcast(size, source, group)
        if not last:
            whole = torch.empty(count, length, int(size), device=device)
        torch.distributed.broadcast(whole, source, group)
    return whole.cpu()
