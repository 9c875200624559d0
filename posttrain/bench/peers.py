"""The others' training loops: `python -m posttrain.bench.peers SIDE ROW STEPS`, a process for each.

They train random full-length sequences in bf16 with AdamW and clipped gradients, the best case for them. A process
imports first, writes a line, and waits for one, so that the imports of all may overlap and no two use the GPU at once.
The last line is a JSON object: seconds of each step, peak_gib.
"""

import importlib
import json
import statistics
import sys

from posttrain import patches
from posttrain.bench.workloads import WORKLOADS

# Side -> the module whose `run` trains; no two are imported in one process.
PEERS = {
    "bridge": "posttrain.bench.peer_bridge",
    "hf": "posttrain.bench.peer_hf",
    "liger": "posttrain.bench.peer_liger",
    "unsloth": "posttrain.bench.peer_unsloth",
}


def main() -> None:
    """Measure one side of one workload."""
    side, name, steps = sys.argv[1], sys.argv[2], int(sys.argv[3])
    workload = next(workload for workload in WORKLOADS if workload.name == name)
    if side == "bridge":
        patches.apply(patches.Platform.detect("cuda"))  # which make its import faster
    result = importlib.import_module(PEERS[side]).run(workload, steps)
    warm = result["seconds"][min(5, steps // 2) :]
    print(json.dumps({"tok_s": workload.tokens / statistics.median(warm), **result}), flush=True)


if __name__ == "__main__":
    main()
