"""One rank of two: `parallel_worker.py DIR RANK LAYOUT/FAMILY...` takes a training step of models in DIR in layouts.

Rank 0 and, in a pipeline, the rank with the logits write their differences to DIR/results.RANK.json.
"""

import json
import os
import sys
import traceback
from pathlib import Path

os.environ["TORCHDYNAMO_DISABLE"] = "1"

LAYOUTS = {
    "tp2": {"tensor_model_parallel_size": 2},
    "tp2_sp": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pp2": {"pipeline_model_parallel_size": 2},
    "ep2": {"expert_model_parallel_size": 2},
}
MOE = ("mixtral", "qwen3_moe")


def applies(layout: str, family: str) -> bool:
    """Experts in parallel for mixtures of experts only, whose tensor parallelism core has with sequence parallel."""
    return layout != ("tp2" if family in MOE else "ep2")


def main() -> None:
    directory, rank = Path(sys.argv[1]), int(sys.argv[2])
    cases = sys.argv[3:]
    from posttrain import patches

    patches.apply(patches.Platform(device="cpu", transformer_engine=False))
    import torch
    from families import FAMILIES
    from megatron.core import parallel_state, tensor_parallel
    from parity import adapter_logits, differences, read_reference, train_step

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=2)
    results = {}
    for layout, sizes in LAYOUTS.items():
        groups = {name: size for name, size in sizes.items() if name != "sequence_parallel"}
        parallel_state.initialize_model_parallel(**groups, expert_tensor_parallel_size=1)
        tensor_parallel.model_parallel_cuda_manual_seed(1)
        pipeline = {"pipeline_dtype": torch.float32} if layout == "pp2" else {}
        for family in FAMILIES:
            if f"{layout}/{family}" not in cases:
                continue
            print(f"{layout}/{family}", flush=True)
            model, adapter = directory / family, directory / f"{layout}-{family}"
            step = train_step(model, **sizes, **pipeline)
            results[f"{layout}/{family}"] = differences(step, read_reference(model))
            logits = adapter_logits(model, adapter, "all-linear", **sizes, **pipeline)
            if rank == 1:
                torch.save(logits, f"{adapter}.pt")
        parallel_state.destroy_model_parallel()
    (directory / f"results.{rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    try:
        main()
    except Exception:
        traceback.print_exc()
        sys.stdout.flush()
        os._exit(1)  # the other process is in a collective with this one: no clean goodbye
