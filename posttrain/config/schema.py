"""Types and ranges of every configuration key, by group.

The YAML files in conf/ hold the values and say what they mean; these dataclasses hold what may be written there.
Hydra merges the YAML into them, so a wrong type or an unknown key stops at compose time. A range is the field's
metadata: `ge`, `gt`, `le`, `lt` or `choices`; `check` reads it. No torch: the composing process stays light.
"""

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import TYPE_CHECKING, Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from posttrain.errors import UserError

# Upper limits: what nobody needs, and what can't be counted, started or held in memory.
STEPS = 10**9
TOKENS = 1 << 24  # of a sequence
PROCESSES = 65_536  # of all machines together, or machines
SEEDS = 2**31 - 1  # Megatron adds the numbers of ranks to it, and NumPy takes 32 bits
# What a limit's name means, and how it is said.
COMPARED: dict[str, tuple[Callable[[Any, Any], bool], str]] = {
    "ge": (operator.ge, "at least"),
    "gt": (operator.gt, "greater than"),
    "le": (operator.le, "at most"),
    "lt": (operator.lt, "less than"),
}


# OmegaConf can't merge unions, nor put a mapping in the place of null where the type says so: to it these may be
# anything, and `check` or the class that they go to looks at them.
if TYPE_CHECKING:
    IntOrWord = int | str
    BoolOrWord = bool | str
    TextOrList = str | list[str]
    MappingOrNull = dict[str, Any] | None
else:
    IntOrWord = BoolOrWord = TextOrList = MappingOrNull = Any


def ranged[T](default: T = MISSING, **limits: float | str | Sequence[str | bool]) -> T:
    """A field with limits (`ge`, `gt`, `le`, `lt`, `choices`), or a `word` in place of a number."""
    return field(default=default, metadata=limits)


@dataclass
class ModelSchema:
    """conf/model: see posttrain.models.HFModel."""

    _target_: str = "posttrain.models.HFModel"
    path: str | None = None
    tokenizer: str | None = None
    random_init: bool = False
    trust_remote_code: bool = False
    architecture: MappingOrNull = None
    learning_rate_scale: float = ranged(1.0, gt=0, le=1e6)


@dataclass
class PeftSchema:
    """conf/peft: see posttrain.peft."""

    _target_: str | None = None
    rank: int = ranged(16, ge=1, le=65_536)
    alpha: float | None = ranged(None, gt=0, le=1e6)
    dropout: float = ranged(0.0, ge=0, lt=1)
    target_modules: TextOrList = "all-linear"
    rslora: bool = False
    lora_plus_ratio: float | None = ranged(None, gt=0, le=1e6)
    fused: bool = True
    recompute_norms: bool = True


@dataclass
class DataRanges:
    """Limits of conf/data's numbers; their types are those of the class that `data._target_` names."""

    validation_fraction: float | None = ranged(None, gt=0, lt=1)
    max_length: int | None = ranged(None, ge=1, le=TOKENS)
    max_train_rows: int | None = ranged(None, ge=1, le=10**12)
    max_validation_rows: int | None = ranged(None, ge=1, le=10**12)
    seed: int | None = ranged(None, ge=0, le=SEEDS)


@dataclass
class ParallelismSchema:
    """conf/parallelism: see posttrain.train.parallelism.Parallelism."""

    _target_: str = "posttrain.train.parallelism.Parallelism"
    auto: bool = False
    memory_gib: float | None = ranged(None, gt=0, le=1e5)
    nproc_per_node: int | None = ranged(None, ge=1, le=PROCESSES)
    tensor_model_parallel_size: int = ranged(1, ge=1, le=PROCESSES)
    pipeline_model_parallel_size: int = ranged(1, ge=1, le=PROCESSES)
    context_parallel_size: int = ranged(1, ge=1, le=PROCESSES)
    expert_model_parallel_size: int = ranged(1, ge=1, le=PROCESSES)
    sequence_parallel: bool | None = None
    distributed_optimizer: bool = False
    fsdp: bool = False
    overlap: bool = True


@dataclass
class OptimizerSchema:
    """conf/optimizer: fields of megatron.bridge.training.config.OptimizerConfig."""

    _target_: str = "megatron.bridge.training.config.OptimizerConfig"
    optimizer: str = ranged("adam", choices=["adam", "sgd"])
    lr: float = ranged(gt=0, le=1e3)
    min_lr: float = ranged(0.0, ge=0, le=1e3)
    weight_decay: float = ranged(0.0, ge=0, le=1e3)
    adam_beta1: float = ranged(0.9, ge=0, lt=1)
    adam_beta2: float = ranged(0.999, ge=0, lt=1)
    adam_eps: float = ranged(1e-8, gt=0, le=1)
    sgd_momentum: float = ranged(0.9, ge=0, lt=1)
    clip_grad: float = ranged(1.0, ge=0)
    use_precision_aware_optimizer: bool = False


@dataclass
class SchedulerSchema:
    """conf/scheduler: fields of megatron.bridge.training.config.SchedulerConfig."""

    _target_: str = "megatron.bridge.training.config.SchedulerConfig"
    lr_decay_style: str = ranged("cosine", choices=["constant", "linear", "cosine", "inverse-square-root", "WSD"])
    lr_warmup_fraction: float | None = ranged(None, ge=0, lt=1)
    lr_warmup_iters: int = ranged(0, ge=0, le=STEPS)
    lr_decay_iters: int | None = ranged(None, ge=1, le=STEPS)
    lr_wsd_decay_iters: int | None = ranged(None, ge=1, le=STEPS)
    lr_wsd_decay_style: str = ranged("linear", choices=["linear", "exponential", "cosine", "minus_sqrt"])


@dataclass
class EarlyStoppingSchema:
    """`trainer.early_stopping`: see posttrain.train.early_stopping."""

    patience: int | None = ranged(None, ge=1, le=STEPS)
    min_delta: float = ranged(0.0, ge=0, le=1e6)


@dataclass
class TrainerSchema:
    """conf/trainer: see posttrain.train.trainer.Trainer."""

    _target_: str = "posttrain.train.trainer.Trainer"
    max_steps: int | None = ranged(None, ge=1, le=STEPS)
    epochs: float | None = ranged(None, gt=0, le=10_000)
    global_batch_size: int = ranged(ge=1, le=1_048_576)
    micro_batch_size: IntOrWord = ranged(ge=1, le=65_536, word="auto")  # noqa: RUF009  as the others
    seq_length: int = ranged(ge=8, le=TOKENS)
    log_interval: int = ranged(1, ge=1, le=STEPS)
    validation_interval: int | None = ranged(None, ge=1, le=STEPS)
    validation_batches: int | None = ranged(None, ge=1, le=STEPS)
    early_stopping: EarlyStoppingSchema = field(default_factory=EarlyStoppingSchema)
    num_generations: int = ranged(3, ge=0, le=10_000)
    max_new_tokens: int = ranged(64, ge=1, le=1_048_576)
    generation_interval: int | None = ranged(None, ge=1, le=STEPS)
    recompute: str = ranged("auto", choices=["auto", "none", "selective", "full"])
    recompute_layers: int | None = ranged(None, ge=1, le=10_000)
    offload_layers: int | None = ranged(None, ge=1, le=10_000)
    on_nonfinite: str = ranged("stop", choices=["stop", "skip", "rollback"])
    max_rollbacks: int = ranged(3, ge=1, le=10_000)
    loss_spike_factor: float | None = ranged(None, gt=1, le=1e9)
    num_workers: int = ranged(2, ge=0, le=256)
    deterministic: bool = False
    profile: bool = False
    cuda_graph: bool | None = None
    skip_prompt_logits: bool = True
    export: BoolOrWord = ranged("last", choices=["last", "best", True, False])  # noqa: RUF009  as the others
    license: str | None = None
    verify: bool = True
    verify_base: bool | None = None
    megatron: dict[str, Any] = field(default_factory=dict)


@dataclass
class PrecisionSchema:
    """conf/precision: see posttrain.train.precision.Precision."""

    _target_: str = "posttrain.train.precision.Precision"
    name: str = ranged("auto", choices=["auto", "fp32", "bf16", "fp8"])


@dataclass
class CheckpointSchema:
    """conf/checkpoint: see posttrain.checkpoint.Checkpoint."""

    _target_: str = "posttrain.checkpoint.Checkpoint"
    save: bool = True
    save_interval: int | None = ranged(None, ge=1, le=STEPS)
    save_interval_minutes: float | None = ranged(15.0, gt=0, le=1e6)
    save_total_limit: int | None = ranged(None, ge=1, le=STEPS)
    keep_best: bool = False
    save_optimizer: bool = True
    async_save: bool = False


@dataclass
class LaunchSchema:
    """How processes are started: see posttrain.launch."""

    nnodes: int = ranged(1, ge=1, le=PROCESSES)
    node_rank: int = ranged(0, ge=0, lt=PROCESSES)
    master_addr: str = "127.0.0.1"
    master_port: int | None = ranged(None, ge=1, le=65535)
    timeout_s: float = ranged(600.0, gt=0, le=31 * 24 * 3600)
    max_restarts: int = ranged(0, ge=0, le=10_000)
    submit: bool = False
    prestart: bool | None = None


@dataclass
class SlurmSchema:
    """conf/hydra/launcher/slurm: see posttrain.sweep.slurm."""

    _target_: str = "hydra_plugins.posttrain_launcher.SlurmLauncher"
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    nodes: int = ranged(1, ge=1, le=PROCESSES)
    gpus_per_node: int = ranged(1, ge=0, le=1_024)
    cpus_per_node: int | None = ranged(None, ge=1, le=65_536)
    mem_gb: float | None = ranged(None, ge=0, le=1e6)
    time: str | None = None
    signal_delay_s: int = ranged(120, ge=0, le=7 * 24 * 3600)
    max_requeues: int = ranged(100, ge=0, le=100_000)
    array_parallelism: int = ranged(256, ge=1, le=100_000)
    setup: list[str] = field(default_factory=list)
    python: str | None = None
    container_image: str | None = None
    container_mounts: str | None = None
    srun_args: list[str] = field(default_factory=list)
    sbatch: dict[str, Any] = field(default_factory=dict)
    poll_s: float = ranged(10.0, gt=0, le=24 * 3600)
    dry_run: bool = False


@dataclass
class RunSchema:
    """Name and resumption of the run."""

    name: str | None = None
    resume: str = "auto"


@dataclass
class RecipeSchema:
    """Which of Megatron-Bridge's recipes a run starts from: see posttrain.recipes."""

    name: str | None = None


@dataclass
class SweepSchema:
    """Trials of a --multirun: see posttrain.sweep."""

    name: str | None = None
    parallel: int = ranged(1, ge=1, le=1_024)
    pruner: str | None = ranged(None, choices=["median", "halving"])
    pruner_startup_trials: int = ranged(4, ge=1, le=10_000)
    pruner_warmup_steps: int = ranged(0, ge=0, le=STEPS)


@dataclass
class Config:
    """The whole configuration, one field per group."""

    model: ModelSchema = MISSING
    peft: PeftSchema = MISSING
    objective: dict[str, Any] = MISSING
    data: dict[str, Any] = MISSING
    template: dict[str, Any] = MISSING
    parallelism: ParallelismSchema = MISSING
    optimizer: OptimizerSchema = MISSING
    scheduler: SchedulerSchema = MISSING
    trainer: TrainerSchema = MISSING
    precision: PrecisionSchema = MISSING
    checkpoint: CheckpointSchema = MISSING
    logger: dict[str, Any] = field(default_factory=dict)
    launch: LaunchSchema = field(default_factory=LaunchSchema)
    run: RunSchema = field(default_factory=RunSchema)
    sweep: SweepSchema = field(default_factory=SweepSchema)
    recipe: RecipeSchema = field(default_factory=RecipeSchema)
    seed: int = ranged(1234, ge=0, le=SEEDS)
    cache_dir: str | None = None


# Of Hydra's own sweepers and of Optuna's samplers, whose types are theirs.
SWEEPER = {
    "n_trials": {"ge": 1, "le": 10_000},
    "n_jobs": {"ge": 1, "le": 1_024},
    "max_batch_size": {"ge": 1, "le": 10_000},
}
SAMPLER = {"le": 10_000}  # each number of a sampler's, but for its seed
SAMPLER_SEED = {"ge": 0, "le": 2**32 - 1}


def limits(config: type = Config) -> dict[str, dict[str, Any]]:
    """Key path -> its limits, for every field of `config` that has some."""
    by_key = {}
    for item in fields(config):
        if item.metadata:
            by_key[item.name] = dict(item.metadata)
        kind = DataRanges if item.name == "data" else item.type
        if isinstance(kind, type) and is_dataclass(kind):
            for inner, limit in limits(kind).items():
                by_key[f"{item.name}.{inner}"] = limit
    return by_key


def check(cfg: DictConfig, limits: Mapping[str, Mapping[str, Any]], above: str = "") -> None:
    """Compare values with their limits.

    Args:
        cfg: that has the values.
        limits: as of the function of this name, key paths from `cfg` on.
        above: key path of `cfg` itself with a full stop, for errors.

    Raises:
        UserError: one is beyond its limits, or no number; naming the key, the value and the limit.
    """
    for path, limit in limits.items():
        value = OmegaConf.select(cfg, path)
        key = f"{above}{path}"
        word = limit.get("word")
        if word and value != word and type(value) is not int:
            raise UserError(f"`{key}={value}`: must be a whole number or {word}")
        if value is None or (word and value == word):
            continue
        choices = limit.get("choices")
        if choices:
            if value not in choices:
                raise UserError(f"`{key}={value}`: must be one of {', '.join(map(format_choice, choices))}")
            continue
        if type(value) not in (int, float):
            raise UserError(f"`{key}={value}`: must be a number")
        for name, (inside, words) in COMPARED.items():
            if name in limit and not inside(value, limit[name]):
                raise UserError(f"`{key}={value}`: must be {words} {limit[name]}")


def format_choice(choice: str | bool) -> str:
    """A choice as it is written on a command line."""
    return str(choice).lower() if isinstance(choice, bool) else choice


HYDRAS_OWN = ("hydra", "hydra.env")  # which Hydra adds to what is composed
PLUGINS_OWN = "hydra.sweeper.sampler"  # Optuna's, which declares the base of a sampler's class alone


def undeclared(node: DictConfig, above: str = "") -> Iterator[str]:
    """Key paths below `node` that its dataclasses don't have; Hydra lets `+key=value` add them.

    Args:
        node: composed.
        above: key path of `node` itself with a full stop.
    """
    kind = OmegaConf.get_type(node)
    declared = getattr(kind, "__dataclass_fields__", None)
    for key in node:
        path = f"{above}{key!s}"
        if declared is not None and key not in declared and path not in HYDRAS_OWN:
            yield path
            continue
        inner = node._get_node(key)
        if path == PLUGINS_OWN:
            continue
        if isinstance(inner, DictConfig) and not (inner._is_none() or inner._is_missing() or inner._is_interpolation()):
            yield from undeclared(inner, f"{path}.")


def register() -> None:
    """Make the schema known to Hydra as `schema`, and that of a launcher."""
    ConfigStore.instance().store(name="schema", node=Config)
    ConfigStore.instance().store(group="hydra/launcher", name="slurm_schema", node=SlurmSchema)
