"""Plan a run before a GPU is requested: `python -m posttrain.plan` with training's overrides.

    python -m posttrain.plan model=llama3_8b data=alpaca data.path=my.json plan.gpu=h100
    python -m posttrain.plan model=llama31_70b peft=lora parallelism=tp4 \\
        plan.gpu=a100 plan.gpus=8 --json

Parameters, memory per GPU by part, steps and tokens, expected time, whether it fits, and the
cheapest change that would make it fit. Loads neither torch nor Megatron.
"""

import json
import sys
from dataclasses import dataclass, field, replace

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, open_dict

from posttrain.cli import command
from posttrain.config import schema
from posttrain.plan import auto
from posttrain.plan.report import build_plan
from posttrain.spec import checks
from posttrain.utils import gpus, stop


@dataclass
class PlanSchema:
    """conf/plan.yaml."""

    gpu: str | None = None
    gpus: int | None = schema.ranged(None, ge=1, le=1_024)
    memory_gib: float | None = schema.ranged(None, gt=0, le=1e5)
    read_data: bool = True
    json: bool = False


@dataclass
class PlanConfig(schema.Config):
    """The configuration of a run, and the GPUs it is planned for."""

    plan: PlanSchema = field(default_factory=PlanSchema)


ConfigStore.instance().store(name="schema_plan", node=PlanConfig)


@stop.command
def main() -> None:
    """Entry point; exits with 2 after a user's mistake, with 1 when the run doesn't fit."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__.strip())
        return
    if "--json" in sys.argv:
        sys.argv[sys.argv.index("--json")] = "plan.json=true"
    fits = []
    command.run(lambda cfg: fits.append(plan(cfg)), config_name="plan")
    raise SystemExit(not all(fits))


def plan(cfg: DictConfig) -> bool:
    """Print the plan of a composed configuration and return whether the run fits.

    Raises:
        UserError: as training would for the same overrides, or an unknown GPU.
    """
    checks.check_ranges(cfg, PlanConfig)
    options = cfg.plan
    with open_dict(cfg):
        del cfg["plan"]
    here = [] if options.gpu else gpus.detect_gpus()
    if here:
        gpu = here[0]
        if options.memory_gib:
            gpu = replace(gpu, memory_gib=options.memory_gib)
        local = options.gpus or len(here)
    else:
        gpu = gpus.find_gpu(options.gpu or "h100", options.memory_gib)
        local = options.gpus or checks.nproc_per_node(cfg, 0)
    if cfg.launch.nnodes > 1 and cfg.launch.master_port is None:
        cfg.launch.master_port = 1  # nothing is started
    shape = checks.check_settings(cfg, local)
    lines = resolve_auto(cfg, local, cfg.parallelism.memory_gib or gpu.memory_gib)
    checks.check_parallelism(cfg, local, shape)
    result = build_plan(cfg, checks.world_size(cfg, local), gpu, options.read_data)
    result["gpu"]["assumed"] = not options.gpu and not here
    result["auto"] = "\n".join(lines) or None
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        from posttrain.plan.display import print_plan

        print_plan(result)
    return result["fits"]


def resolve_auto(cfg: DictConfig, local: int, memory_gib: float) -> list[str]:
    """Replace `auto` in `cfg` as a run would, but also where the run does not fit.

    Args:
        cfg: changed in place.
        local: processes on each machine.
        memory_gib: of one GPU.

    Returns:
        Lines about what was chosen.
    """
    choose_split = cfg.parallelism.auto
    choose_batch = cfg.trainer.micro_batch_size == auto.AUTO
    lines = []
    if choose_batch:
        cfg.trainer.micro_batch_size = 1
    if choose_split:
        choice = auto.choose(cfg, local, memory_gib, transformer_engine=True)
        lines.append(choice.describe(memory_gib))
        auto.apply_choice(cfg, choice)
    if choose_batch:
        world = checks.world_size(cfg, local)
        lines.append(auto.fill_memory(cfg, world, memory_gib, transformer_engine=True))
    return lines


if __name__ == "__main__":
    main()
