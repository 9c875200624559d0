"""What a run needs, before a GPU is asked for: `python -m posttrain.plan` with the words of the training command.

    python -m posttrain.plan model=llama3_8b data=alpaca data.path=my.json plan.gpu=h100
    python -m posttrain.plan model=llama31_70b peft=lora parallelism=tp4 plan.gpu=a100 plan.gpus=8 --json

Parameters, memory per GPU by part, steps and tokens, expected time, whether it fits, and the cheapest change that would
make it fit. Neither torch nor Megatron is loaded.
"""

import json
import sys
from dataclasses import dataclass, field

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, open_dict

from posttrain import check, compose, schema, stop
from posttrain.errors import UserError
from posttrain.plan import auto, gpus
from posttrain.plan.report import report


@dataclass
class PlanSchema:
    """conf/plan.yaml."""

    gpu: str | None = None
    gpus: int | None = None
    memory_gib: float | None = None
    count: bool = True
    json: bool = False


@dataclass
class PlanConfig(schema.Config):
    """The configuration of a run, and the GPUs it is planned for."""

    plan: PlanSchema = field(default_factory=PlanSchema)


ConfigStore.instance().store(name="schema_plan", node=PlanConfig)


@stop.command
def main() -> None:
    """Entry point; exits with 2 after a mistake of the user's, with 1 when the run doesn't fit."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__.strip())
        return
    sys.argv[1:] = ["plan.json=true" if word == "--json" else word for word in sys.argv[1:]]
    fits = []
    compose.run(lambda cfg: fits.append(run(cfg)), config_name="plan")
    raise SystemExit(0 if all(fits) else 1)


def run(cfg: DictConfig) -> bool:
    """Print the plan of a composed configuration; returns whether the run fits.

    Raises:
        UserError: as training would for the same words, or an unknown GPU.
    """
    options = cfg.plan
    with open_dict(cfg):
        del cfg["plan"]
    for key, value in (("gpus", options.gpus), ("memory_gib", options.memory_gib)):
        if value is not None and value <= 0:
            raise UserError(f"`plan.{key}={value}`: must be more than 0")
    here = [] if options.gpu else gpus.detected()
    gpu = here[0] if here else gpus.named(options.gpu or "h100", options.memory_gib)
    if options.memory_gib and here:
        gpu = gpus.Gpu(gpu.name, gpu.tflops, options.memory_gib)
    local = options.gpus or (len(here) if here else check.nproc_per_node(cfg, 0))
    if cfg.launch.nnodes > 1 and cfg.launch.master_port is None:
        cfg.launch.master_port = 1  # nothing is started
    line, memory_gib = None, cfg.parallelism.memory_gib or gpu.memory_gib
    if cfg.parallelism.auto or cfg.trainer.micro_batch_size == auto.AUTO:
        check.settings(cfg, local)
    if filled := cfg.trainer.micro_batch_size == auto.AUTO:
        cfg.trainer.micro_batch_size = 1
    if cfg.parallelism.auto:
        chosen = auto.choose(cfg, local, memory_gib, transformer_engine=True)
        line = chosen.line(memory_gib)
        auto.put(cfg, chosen)
    if filled:
        line = "\n".join([*filter(None, [line]), auto.fill_memory(cfg, check.world_size(cfg, local), memory_gib, True)])
    check.check(cfg, local)
    found = report(cfg, check.world_size(cfg, local), gpu, options.count)
    found["gpu"]["assumed"] = not (options.gpu or here)
    found["auto"] = line
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        from posttrain.plan.show import show

        show(found)
    return found["fits"]


if __name__ == "__main__":
    main()
