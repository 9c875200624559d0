"""Plan a run before a GPU is requested: `python -m posttrain.plan` with training's overrides.

    python -m posttrain.plan model=llama3_8b data=alpaca data.path=my.json plan.gpu=h100
    python -m posttrain.plan model=llama31_70b peft=lora parallelism=tp4 \\
        plan.gpu=a100 plan.gpus=8 --json

Parameters, memory per GPU by part, steps and tokens, expected time, whether it fits, and the
cheapest change that would make it fit. Loads neither torch nor Megatron. Exit code 1: it doesn't fit as asked.
"""

import functools
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, open_dict
from omegaconf.errors import OmegaConfBaseException

from posttrain.cli import command, cpu_sizes
from posttrain.config import schema, yaml_file
from posttrain.config.composition import CONF_DIR
from posttrain.errors import UserError
from posttrain.models.families import position_limit_of
from posttrain.plan import auto
from posttrain.plan.advice import Change
from posttrain.plan.data_stats import Kept
from posttrain.plan.memory import HOST_MEMORY
from posttrain.plan.report import Plan, Replan, build_plan
from posttrain.plan.typed_settings import PROCESSES, TypedSavings, TypedSettings
from posttrain.spec import checks, first_rows, model_checks
from posttrain.spec.parallel_sizes import ProcessCount
from posttrain.spec.resolve import AUTO
from posttrain.utils import gpus, stop, working

# What conf/data/demo.yaml sets of the trainer, on which memory, steps and time depend.
OF_DEMO = ("seq_length", "global_batch_size", "micro_batch_size", "max_steps")
UNDIVIDED = "parallelism=ddp"


@dataclass
class PlanSchema:
    """conf/plan.yaml."""

    gpu: str | None = None
    gpus: int | None = schema.ranged(None, ge=1, le=1_024)
    memory_gib: float | None = schema.ranged(None, gt=0, le=1e5)
    host_memory_gib: float | None = schema.ranged(None, gt=0, le=1e6)
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
        command.show_help(__doc__, "plan")
        return
    if "--json" in sys.argv:
        sys.argv[sys.argv.index("--json")] = "plan.json=true"
    overrides = command.typed_overrides()
    fits = []
    command.run(lambda cfg: fits.append(plan(cfg, overrides)), config_name="plan")
    raise SystemExit(not all(fits))


def plan(cfg: DictConfig, overrides: Sequence[str] = ()) -> bool:
    """Print the plan of a composed configuration and return whether the run fits.

    Args:
        cfg: what was composed.
        overrides: that it was composed of, to plan a change of them in full; none: changes are estimated.

    Raises:
        UserError: as training would for the same overrides, or an unknown GPU.
    """
    as_json = cfg.plan.json
    kept: Kept = {}
    replan = functools.partial(plan_change, overrides, kept=kept) if overrides else None
    result = estimate(cfg, overrides, replan, kept)
    if as_json:
        print(json.dumps(result, indent=2))
    else:
        from posttrain.plan.display import print_plan

        print_plan(result)
    return result["fits"]


def plan_change(overrides: Sequence[str], change: Change, kept: Kept | None = None) -> Plan | None:
    """The plan of a change's overrides besides those of the command line; None: they don't go together."""
    changed = [*overrides, *change.overrides]
    if "gpus" in change.kinds or "plan.gpus" not in cpu_sizes.keys_of(overrides):
        changed.append(f"plan.gpus={change.setting.world // change.setting.machines}")
    try:
        return estimate(command.compose(changed, "plan"), changed, None, kept)
    except (UserError, HydraException, OmegaConfBaseException):
        return None


def estimate(cfg: DictConfig, overrides: Sequence[str], replan: Replan | None, kept: Kept | None = None) -> Plan:
    """The plan of a composed configuration, which is changed; for the arguments and errors see `plan`, `build_plan`."""
    checks.check_ranges(cfg, PlanConfig)
    options = cfg.plan
    with open_dict(cfg):
        del cfg["plan"]
    here = None if options.gpu else gpus.smallest_gpu()
    if here:
        gpu = replace(here, memory_gib=options.memory_gib or here.memory_gib)
        local = options.gpus or len(gpus.detect_gpus())
    else:
        gpu = gpus.find_gpu(options.gpu or "h100", options.memory_gib)
        local = options.gpus or checks.nproc_per_node(cfg, 0)
    gpu = with_host(gpu, options.host_memory_gib, local)
    if cfg.launch.nnodes > 1 and cfg.launch.master_port is None:
        cfg.launch.master_port = 1  # nothing is started
    note = leave_demo(cfg, overrides) or without_file(cfg)
    assumed = not options.gpu and not here
    keys = cpu_sizes.keys_of(overrides)
    of_cpu = []
    if assumed and options.read_data and cpu_sizes.are_left(keys):
        of_cpu = cpu_sizes.choose([cfg], keys)
    # Of several kinds of GPUs here the check itself looks for the oldest one.
    shape = checks.check_settings(cfg, local, elsewhere=not here, gpu=None if here else gpu)
    count = process_count(cfg, options.gpus, local, bool(here))
    typed = typed_settings(cfg, overrides, local, fewest=not here and not options.gpus)
    chosen_for = replace(gpu, memory_gib=cfg.parallelism.memory_gib or gpu.memory_gib)
    lines = auto.resolve_on(cfg, local, chosen_for, transformer_engine=True, has_to_fit=False)
    checks.check_parallelism(cfg, local, shape, count)
    if options.read_data and note is None:
        first_rows.look(cfg)
    working.phase("planning")
    world = checks.world_size(cfg, local)
    result = build_plan(cfg, world, gpu, options.read_data and note is None, replan, typed, kept)
    if note is not None:
        result["data"] = {"not_counted": note}
    result["gpu"]["assumed"] = assumed
    result["gpu"]["on_each_machine"] = checks.nproc_per_node(cfg, local)
    result["gpu"]["idle"] = local - result["gpu"]["on_each_machine"]
    result["gpu"]["host_assumed"] = not here and not options.host_memory_gib
    result["sizes_on_this_cpu"] = of_cpu
    result["auto"] = "\n".join(lines) or None
    return result


def typed_settings(cfg: DictConfig, overrides: Sequence[str], local: int, fewest: bool) -> TypedSettings:
    """How a run was asked for.

    Args:
        cfg: as composed, before anything is chosen.
        overrides: that it was composed of.
        local: GPUs of each machine.
        fewest: whether nothing says how many there are.
    """
    savings = None
    if cfg.parallelism.auto:
        savings = TypedSavings(cfg.trainer.recompute, cfg.trainer.offload_layers)
    micro_batch = cfg.trainer.micro_batch_size == AUTO
    return TypedSettings(savings, micro_batch, pinned_keys(overrides), cfg.parallelism[PROCESSES], local, fewest)


def pinned_keys(overrides: Sequence[str]) -> frozenset[str]:
    """The keys of `parallelism` that are set beside its file, by the command line or by a ready run."""
    keys = cpu_sizes.keys_of(overrides)
    pinned = {key.removeprefix("parallelism.") for key in keys if key.startswith("parallelism.")}
    if keys & {"experiment", "recipe"}:
        left = command.compose([*overrides, UNDIVIDED], "plan").parallelism
        alone = command.compose([UNDIVIDED], "plan").parallelism
        pinned |= {key for key in alone if left[key] != alone[key]}
    return frozenset(pinned)


def process_count(cfg: DictConfig, asked: int | None, local: int, here: bool) -> ProcessCount:
    """What an error says of the number of processes.

    Args:
        cfg: as composed.
        asked: plan.gpus.
        local: GPUs of each machine.
        here: whether they are this machine's.

    Raises:
        UserError: more processes than GPUs are asked for.
    """
    given = cfg.parallelism.nproc_per_node
    if asked and given is not None and given > asked:
        raise UserError(
            f"`plan.gpus={asked}`: fewer GPUs than the processes on each machine, parallelism.nproc_per_node={given}; "
            f"plan.gpus={given} has one for each"
        )
    if asked and given is None:
        return checks.process_count(cfg, local, "plan.gpus")
    if not here and given is None:
        return ProcessCount(local, "plan.gpus", "as few as the sizes in parallelism need")
    return checks.process_count(cfg, local)


def with_host(gpu: gpus.Gpu, host_memory_gib: float | None, local: int) -> gpus.Gpu:
    """The GPU with its part of the memory of its machine.

    Args:
        gpu: of this machine, which knows it, or of another.
        host_memory_gib: as in `plan`.
        local: GPUs of each machine.
    """
    if host_memory_gib is not None:
        return replace(gpu, host_gib=host_memory_gib / local)
    if gpu.host_gib is None:
        return replace(gpu, host_gib=HOST_MEMORY * gpu.memory_gib)
    return gpu


def leave_demo(cfg: DictConfig, overrides: Sequence[str]) -> str | None:
    """Take the demo's short sequences and few rows out of a plan whose overrides choose a model and no data.

    Args:
        cfg: gets the trainer's own values, for what no override sets.
        overrides: of the command line.

    Returns:
        What is planned instead; None: nothing is changed.
    """
    keys = cpu_sizes.keys_of(overrides)
    groups = {key.partition(".")[0] for key in keys}
    if "model" not in groups or groups & {"data", "objective", "experiment", "recipe"}:
        return None
    own = yaml_file.read(CONF_DIR / "trainer" / "default.yaml")
    limit = position_limit_of(model_checks.architecture(cfg.model) or {})
    said = []
    for key in OF_DEMO:
        name = f"trainer.{key}"
        if name in keys or (key == "max_steps" and "trainer.epochs" in keys):
            continue
        value = own[key]
        if key == "seq_length" and limit is not None:
            value = min(value, limit)
        cfg.trainer[key] = value
        if value is not None:
            said.append(f"{name}={value}")
    instead = f"; planned with {' '.join(said)}" if said else ""
    return f"no data= is given{instead} (data=demo plans the demo)"


def without_file(cfg: DictConfig) -> str | None:
    """Let data be planned that have a format and no file yet, as those of a ready run.

    Args:
        cfg: gets the name of a file that is not read.

    Returns:
        What is planned instead; None: there is a file.
    """
    if "path" not in cfg.data or cfg.data.path is not None or cfg.data.sources:
        return None
    cfg.data.path = "demo:sentences"
    return "no data.path= is given"


if __name__ == "__main__":
    main()
