"""One training step's logits and gradients of a tiny model, in transformers and in Megatron, under the same names.

Gradients are compared as weights are: put in the weights' place, saved or exported. That covers what conversion does
to them, and the transformers side needs no second table of names.
"""

import shutil
import zlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from families import save_random
from safetensors.torch import load_file, save_file

from posttrain.models import HFModel
from posttrain.peft import LoRA

LENGTHS = (11, 7, 6)
GENERATOR = torch.Generator().manual_seed(1)
TOKENS = torch.randint(3, 96, (1, sum(LENGTHS)), generator=GENERATOR)
LABELS = torch.randint(3, 96, (1, sum(LENGTHS)), generator=GENERATOR)
MASK = torch.rand(1, sum(LENGTHS), generator=GENERATOR) < 0.6


@dataclass
class Step:
    """Logits [1, t, vocabulary] (None where another pipeline stage has them) and gradients by Hugging Face names."""

    logits: torch.Tensor | None
    gradients: dict[str, torch.Tensor]


def write_reference(family: str, directory: Path, width: int = 1, device: str = "cpu", **fields) -> None:
    """Write a random model, with further fields of its config, to `directory`; its logits and gradients beside it."""
    write_step(save_random(family, directory, width=width, **fields).to(device), directory)


def write_step(model, directory: Path) -> None:
    """Write the logits and gradients of a transformers model to `directory`."""
    directory.mkdir(exist_ok=True)
    logits = unpacked_logits(model).float()
    losses = torch.nn.functional.cross_entropy(logits[0], LABELS[0].to(model.device), reduction="none")
    (losses * MASK[0].to(model.device)).sum().div(MASK.sum()).backward()
    torch.save(logits.detach().cpu(), directory / "logits.pt")
    for parameter in model.parameters():
        parameter.data = parameter.grad
    model.save_pretrained(directory / "gradients")


def peft_logits(directory: Path, adapter: Path) -> torch.Tensor:
    """What transformers and PEFT make of the model and the exported adapter."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    return unpacked_logits(PeftModel.from_pretrained(base, adapter, torch_device="cpu").eval()).detach()


def merged_logits(adapter: Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.Tensor:
    """What transformers makes of the merged model."""
    from transformers import AutoModelForCausalLM

    merged = adapter / "merged"
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=dtype, attn_implementation="eager").to(device)
    return unpacked_logits(model).detach()


def unpacked_logits(model) -> torch.Tensor:
    """Logits of the sequences, each by itself, joined."""
    return torch.cat([model(part).logits for part in TOKENS.to(model.device).split(LENGTHS, dim=1)], dim=1)


def read_reference(directory: Path) -> Step:
    """What `write_reference` wrote."""
    logits = torch.load(directory / "logits.pt", weights_only=True)
    return Step(logits, load_file(directory / "gradients" / "model.safetensors"))


def train_step(directory: Path, **layout) -> Step:
    """One forward and backward of the model in `directory`, on packed sequences; see `build` for the layout."""
    bridge, parts, logits = build(directory, **layout)
    run(parts)
    with torch.no_grad():
        for part in parts:
            for parameter in part.parameters():
                parameter.copy_(parameter.main_grad)
    gradients = dict(bridge.export_hf_weights(parts, cpu=True, show_progress=False))
    return Step(logits[0] if logits else None, gradients)


def adapter_logits(directory: Path, out: Path, target_modules, **layout) -> torch.Tensor | None:
    """Logits of the model in `directory` with a random LoRA adapter; exported to `out`, and merged to `out`/merged."""
    lora = LoRA(rank=4, alpha=8, target_modules=target_modules).build()
    bridge, parts, logits = build(directory, lora=lora, **layout)
    randomise_adapters(parts)
    run(parts)
    bridge.save_hf_adapter(parts, out, lora, base_model_name_or_path=str(directory), show_progress=False)
    weights = {name: w.clone() for name, w in bridge.export_hf_weights(parts, cpu=True, show_progress=False)}
    if torch.distributed.get_rank() == 0:
        (out / "merged").mkdir()
        shutil.copy(directory / "config.json", out / "merged")
        save_file(weights, out / "merged" / "model.safetensors", metadata={"format": "pt"})
    return logits[0] if logits else None


@torch.no_grad()
def randomise_adapters(parts) -> None:
    """Make every adapter's B random: other numbers on each process for what is its own, the same for what is shared."""
    from megatron.core import parallel_state

    dense = parallel_state.get_tensor_model_parallel_rank()
    expert = parallel_state.get_expert_tensor_parallel_rank(), parallel_state.get_expert_model_parallel_rank()
    for part in parts:
        for name, parameter in part.named_parameters():
            if "linear_out" in name:
                seed = zlib.crc32(f"{name} {expert if 'experts' in name else dense}".encode())
                random = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
                parameter.copy_(0.2 * random)


def build(directory: Path, lora=None, gpu: bool = False, eight_bit: bool = False, **layout):
    """Return the bridge, the model's parts of this process, and a list that its logits will be put in.

    Args:
        directory: a Hugging Face model.
        lora: Megatron-Bridge's adapter.
        gpu: Transformer Engine's layers in bf16, instead of local layers in fp32.
        eight_bit: the linear layers in 8 bits.
        layout: fields of the provider: tensor_model_parallel_size and so on.
    """
    from megatron.core.distributed import DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    from posttrain.models.eight_bit_layers import eight_bit_layer_spec
    from posttrain.models.local_spec import use_local_layers

    bridge = HFModel(path=str(directory)).bridge()
    provider = bridge.to_megatron_provider()
    if gpu:
        provider.gradient_accumulation_fusion = False
        provider.bf16, provider.params_dtype = True, torch.bfloat16
    else:
        use_local_layers(provider)
    if eight_bit:
        provider.transformer_layer_spec = partial(eight_bit_layer_spec, provider.transformer_layer_spec)
    provider.use_cpu_initialization = not gpu
    provider.calculate_per_token_loss = True
    for name, value in layout.items():
        setattr(provider, name, value)
    if lora is not None:
        provider.register_pre_wrap_hook(lambda model: lora(model, training=True))
    if gpu:
        provider.register_pre_wrap_hook(with_chosen_attention)
    provider.finalize()
    parts = provider.provide_distributed_model(
        ddp_config=DistributedDataParallelConfig(grad_reduce_in_fp32=True), use_cpu_initialization=not gpu
    )
    parts[0].config.finalize_model_grads_func = finalize_model_grads
    logits: list[torch.Tensor] = []

    def keep_logits(module, inputs, output):
        # A copy: the loss is computed in place.
        logits.append(gather_from_tensor_model_parallel_region(output[0].detach().float().clone()).transpose(0, 1))

    for part in parts:
        for module in part.modules():
            if getattr(module, "output_layer", None) is not None and getattr(module, "post_process", False):
                module.output_layer.register_forward_hook(keep_logits)
    return bridge, parts, logits


def with_chosen_attention(parts):
    """As a run's model has it."""
    from posttrain.models.local_spec import choose_attention

    choose_attention(parts)
    return parts


def run(parts) -> None:
    """One forward and backward by Megatron's own schedule."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    for part in parts:
        part.zero_grad_buffer()
    get_forward_backward_func()(
        forward_step_func=forward_step, data_iterator=iter([None]), model=parts, num_microbatches=1,
        seq_length=sum(LENGTHS), micro_batch_size=1, forward_only=False,
    )  # fmt: skip


def forward_step(iterator, model):
    """Megatron's forward step: per-token losses, and how to sum them."""
    from megatron.core.packed_seq_params import PackedSeqParams

    next(iterator)
    device = next(model.parameters()).device
    ends = torch.tensor([0, *LENGTHS]).cumsum(0).int().to(device)
    packed = PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends, max_seqlen_q=max(LENGTHS), max_seqlen_kv=max(LENGTHS)
    )
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    tokens, positions, labels, mask = (tensor.to(device) for tensor in (TOKENS, positions, LABELS, MASK))
    losses = model(tokens, positions, None, labels=labels, packed_seq_params=packed)

    def total(losses):
        return (losses * mask).sum(), mask.sum().int(), {}

    return losses, total


def differences(found: Step, expected: Step) -> dict[str, float]:
    """Largest absolute difference of the logits, and of each gradient relative to its largest entry."""
    assert found.gradients.keys() == expected.gradients.keys()
    errors = {
        name: ((found.gradients[name] - value).abs().max() / value.abs().max().clamp(min=1e-6)).item()
        for name, value in expected.gradients.items()
    }
    if found.logits is not None:
        errors["logits"] = (found.logits - expected.logits).abs().max().item()
    return errors
