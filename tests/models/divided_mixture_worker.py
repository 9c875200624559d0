"""One process of several that a mixture's experts are divided over: `divided_mixture_worker.py DIR RANK WORLD`.

Writes DIR/RANK-WORLD.pt: for each layout and family the output and the input's gradient of this process's tokens, the
adapters' gradients as Megatron has reduced them, and the norm of all adapters' gradients that its optimizer computes.
"""

import os
import sys
import traceback
from pathlib import Path

os.environ["TORCHDYNAMO_DISABLE"] = "1"

TP = "tensor_model_parallel_size"
EP = "expert_model_parallel_size"
LAYOUTS = {
    2: {"ep2": {EP: 2}, "tp2, ep2": {TP: 2, EP: 2}},
    4: {"ep4": {EP: 4}, "ep2, twice": {EP: 2}, "tp2, ep2, twice": {TP: 2, EP: 2}, "tp2, ep4": {TP: 2, EP: 4}},
}
FAMILIES = ("mixtral", "qwen3_moe")
NAMES = ("linear_fc1", "linear_fc2")


def put_adapters(torch, layer, pairs):
    """Upstream's adapters that all experts share, as Megatron-Bridge attaches them, with these values."""
    from megatron.bridge.peft.utils import ParallelLinearAdapter
    from test_mixture_layer import HIDDEN, INNER, RANK, SCALE

    from posttrain.ops.fused_lora import FusedLoRALinear

    shapes = [(HIDDEN, 2 * INNER), (INNER, HIDDEN)]
    for name, (inputs, outputs), (a, b) in zip(NAMES, shapes, (pairs[:2], pairs[2:]), strict=True):
        adapter = ParallelLinearAdapter(
            inputs,
            outputs,
            RANK,
            base_linear_name=f"decoder.layers.0.mlp.experts.{name}",
            activation="identity",
            input_is_parallel=name == "linear_fc2",
            model_parallel_config=layer.config,
            alpha=SCALE * RANK,
            is_expert=True,
        )
        with torch.no_grad():
            adapter.linear_in.weight.copy_(a)
            adapter.linear_out.weight.copy_(b)
        setattr(layer.experts, name, FusedLoRALinear(getattr(layer.experts, name), adapter))
    return [part.weight for name in NAMES for part in _parts(getattr(layer.experts, name).adapter)]


def _parts(adapter):
    return adapter.linear_in, adapter.linear_out


def step(torch, family, rank, world, sizes):
    """{name: what this process has of it}."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from test_mixture_layer import CASES, TOKENS, adapters, inputs, our_layer, reference_block

    from posttrain.peft.seeded import count_shared_once

    case = CASES[family]
    layer = our_layer(
        torch,
        reference_block(torch, *case),
        *case[1:],
        expert_tensor_parallel_size=1,
        sequence_parallel=TP in sizes,
        calculate_per_token_loss=True,
        **sizes,
    )
    layer.requires_grad_(False)
    weights = put_adapters(torch, layer, [pair.detach() for pair in adapters(torch)])
    count_shared_once([layer])
    data_parallel = DistributedDataParallel(layer.config, DistributedDataParallelConfig(), layer)
    own = slice(rank * TOKENS // world, (rank + 1) * TOKENS // world)
    x = inputs(torch)[own].requires_grad_()
    y, _ = data_parallel(x)
    count = TOKENS * y[0].numel()
    of_loss = torch.arange(count, dtype=y.dtype).view(TOKENS, *y.shape[1:])[own] / count
    (y.sin() * of_loss).sum().backward()
    data_parallel.finish_grad_sync()
    reduced = [weight.main_grad.clone() for weight in weights]
    optimizer = get_megatron_optimizer(OptimizerConfig(optimizer="adam", lr=1e-3), [data_parallel])
    optimizer.prepare_grads()
    return {"y": y.detach(), "x": x.grad, "adapters": reduced, "norm": optimizer.get_grad_norm()}


def main():
    """Compute everything."""
    directory, rank, world = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    from posttrain import patches

    patches.apply(patches.Platform(device="cpu", transformer_engine=False))
    import torch
    from megatron.core import parallel_state, tensor_parallel

    torch.set_num_threads(1)
    store = f"file://{directory}/store-{world}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    found = {}
    for layout, sizes in LAYOUTS[world].items():
        parallel_state.initialize_model_parallel(**sizes, expert_tensor_parallel_size=1)
        tensor_parallel.model_parallel_cuda_manual_seed(1)
        for family in FAMILIES:
            found[layout, family] = step(torch, family, rank, world, sizes)
        parallel_state.destroy_model_parallel()
    torch.save(found, directory / f"{rank}-{world}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except Exception:
        traceback.print_exc()
        sys.stdout.flush()
        os._exit(1)  # the others are in a collective with this one: no clean goodbye
