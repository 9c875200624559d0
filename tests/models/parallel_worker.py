"""One rank of two: `parallel_worker.py DIR RANK` takes a training step of every model in DIR in every layout.

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
        for family in FAMILIES:
            if applies(layout, family):
                try:
                    pipeline = {"pipeline_dtype": torch.float32} if layout == "pp2" else {}
                    step = train_step(directory / family, **sizes, **pipeline)
                    results[f"{layout}/{family}"] = differences(step, read_reference(directory / family))
                    adapter = directory / f"{layout}-{family}"
                    logits = adapter_logits(directory / family, adapter, "all-linear", **sizes, **pipeline)
                    if rank == 1:
                        torch.save(logits, directory / f"{layout}-{family}.pt")
                except Exception as error:  # told by the test of this model and layout
                    results[f"{layout}/{family}"] = {"".join(traceback.format_exception(error)): float("inf")}
        parallel_state.destroy_model_parallel()
    (directory / f"results.{rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
