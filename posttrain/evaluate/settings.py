"""The schema of conf/evaluate.yaml, and the configuration of each set.

A set's configuration is a run's own with the overrides of the set. Imports no torch.
"""

import importlib.util
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import OverrideParseException
from omegaconf import MISSING, DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from posttrain.config import composition, frozen, policy, schema
from posttrain.config.containers import as_dict
from posttrain.config.overrides import quote_expressions
from posttrain.errors import UserError
from posttrain.generate.sampling import MAX_NEW_TOKENS, MOST_TEMPERATURE, Sampling
from posttrain.utils.user_paths import expand_home

TRUST = "lm_eval.trust_include_path=true"

# Taken from a run unless overridden: what decides which tokens are measured, and how exactly.
OF_RUN = ("objective", "data", "template", "precision", "seed", "trainer")


@dataclass
class EvaluateSchema:
    """conf/evaluate.yaml."""

    split: str = schema.ranged("auto", choices=["auto", "validation", "train"])
    datasets: schema.MappingOrNull = None  # name -> overrides
    group_by: str | None = "category"
    limit: int | None = schema.ranged(None, ge=1, le=10**12)
    batch_tokens: int = schema.ranged(4096, ge=1, le=schema.TOKENS)
    batch_size: int = schema.ranged(8, ge=1, le=65_536)
    max_new_tokens: int = schema.ranged(256, ge=1, le=MAX_NEW_TOKENS)
    temperature: float = schema.ranged(0.0, ge=0, le=MOST_TEMPERATURE)
    top_p: float = schema.ranged(1.0, gt=0, le=1)
    out: str = MISSING


@dataclass
class LMEvalSchema:
    """lm-eval's part of conf/evaluate.yaml."""

    tasks: list[str] = field(default_factory=list)
    include_path: str | None = None
    trust_include_path: bool = False
    num_fewshot: int | None = schema.ranged(None, ge=0, le=1_000)
    limit: int | None = schema.ranged(None, ge=1, le=10**12)
    batch_size: int = schema.ranged(8, ge=1, le=65_536)
    chat_template: bool = False


@dataclass
class EvaluateConfig(schema.Config):
    """The configuration of a run, and what to measure."""

    evaluate: EvaluateSchema = field(default_factory=EvaluateSchema)
    lm_eval: LMEvalSchema = field(default_factory=LMEvalSchema)
    metric: dict[str, Any] = MISSING


ConfigStore.instance().store(name="schema_evaluate", node=EvaluateConfig)


def with_run(cfg: DictConfig, run_dir: Path) -> DictConfig:
    """Return `cfg` with the values that the run in `run_dir` was trained with; see OF_RUN."""
    ran = frozen.read(run_dir)
    merged = cfg.copy()
    try:
        with open_dict(merged):
            for key in ("objective", "data", "template", "seed"):
                merged[key] = ran[key]
        merged.precision.name = ran.precision.name
        merged.trainer.seq_length = ran.trainer.seq_length
    except (OmegaConfBaseException, AttributeError, KeyError) as error:
        raise UserError(f"{run_dir / 'config.yaml'}: not the configuration of a run: {error}") from None
    return merged


def is_of_run(override: str) -> bool:
    """Whether an override sets a value that is otherwise taken from the run."""
    return top_key(override) in OF_RUN


def top_key(override: str) -> str:
    """The first part of an override's key: `data` of `+data.path=x`."""
    return override.lstrip("+~").partition("=")[0].partition(".")[0]


def refuse_model(overrides: list[str]) -> None:
    """Refuse overrides of the model: they would be ignored, and the result be misunderstood.

    Raises:
        UserError: an override sets the model.
    """
    for override in overrides:
        if top_key(override) == "model":
            raise UserError(
                f"`{override}`: the model to evaluate is the first argument: python -m posttrain.evaluate WHAT data=..."
            )


def refuse_ruled(overrides: list[str]) -> None:
    """Refuse what a file may not set: the overrides of a data set may be in a file.

    Raises:
        UserError: an override sets it.
    """
    for override in overrides:
        key = override.lstrip("+~").partition("=")[0].partition("@")[0].replace("/", ".")
        rule = policy.rule_of(key)
        if rule is not None:
            raise UserError(f"`{override}`: {rule.why}; put it on the command line, outside of evaluate.datasets")


def apply_overrides(cfg: DictConfig, overrides: list[str]) -> DictConfig:
    """Return `cfg` with `overrides`: groups are composed anew, single values replaced.

    Raises:
        UserError: as for the same overrides on a command line.
    """
    overrides = quote_expressions(overrides)
    try:
        parsed = OverridesParser.create().parse_overrides(overrides)
    except OverrideParseException as error:
        raise UserError(composition.explain(error, overrides)) from None
    groups = set()
    for item in parsed:
        if (composition.CONF_DIR / item.key_or_group).is_dir():
            groups.add(item.key_or_group)
    of_groups = []
    of_values = []
    for override, item in zip(overrides, parsed, strict=True):
        if item.key_or_group.partition(".")[0] in groups:
            of_groups.append(override)
        else:
            of_values.append(item)
    merged = cfg.copy()
    if groups:
        composed = composition.compose(of_groups, "evaluate")
        with open_dict(merged):
            for group in groups:
                merged[group] = composed[group]
    OmegaConf.set_struct(merged, True)
    for item in of_values:
        try:
            OmegaConf.update(merged, item.key_or_group, item.value(), force_add=item.is_add())
        except OmegaConfBaseException as error:
            reason = (str(error).strip() or repr(error)).splitlines()[0]
            raise UserError(f"`{item.key_or_group}={item.get_value_string()}`: {reason}") from None
    return merged


def configure_sets(cfg: DictConfig) -> dict[str, DictConfig]:
    """Return the configuration of each set by its name; without `evaluate.datasets`, of the one set.

    Raises:
        UserError: `evaluate.datasets` is not a mapping of names to overrides, or one of them is wrong.
    """
    if not cfg.evaluate.datasets:
        path = cfg.data.path
        is_file = isinstance(path, str) and "://" not in path
        name = Path(path).stem if is_file else "data"
        return {name: cfg}
    if not isinstance(cfg.evaluate.datasets, DictConfig):
        raise UserError(
            "evaluate.datasets: requires names with their overrides: "
            'evaluate.datasets={a:"data=alpaca data.path=a.json"}'
        )
    configs = {}
    for name, text in as_dict(cfg.evaluate.datasets).items():
        if not isinstance(text, str):
            raise UserError(
                f'evaluate.datasets.{name}: put the overrides in quotes, {name}:"data=alpaca data.path=a.json"'
            )
        try:
            overrides = shlex.split(text)
            refuse_model(overrides)
            refuse_ruled(overrides)
            configs[name] = apply_overrides(cfg, overrides)
        except (UserError, ValueError) as error:
            raise UserError(f"evaluate.datasets.{name}: {error}") from None
    return configs


def sampling_of(options: DictConfig) -> Sampling:
    """How answers are generated.

    Args:
        options: conf/evaluate.yaml's `evaluate`.

    Raises:
        UserError: options contradict each other.
    """
    try:
        return Sampling(options.max_new_tokens, options.temperature, options.top_p)
    except UserError as error:
        raise UserError(f"evaluate.{error}") from None


def check_lm_eval(options: DictConfig, overrides: list[str]) -> None:
    """Check, before the model is loaded, that lm-eval can run.

    Args:
        options: conf/evaluate.yaml's `lm_eval`.
        overrides: of the command line: only there can a folder be trusted, not in a file.

    Raises:
        UserError: lm-eval is not installed, the folder does not exist, or it is not trusted.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("lm_eval.tasks: lm-eval is not installed; run `uv sync --extra eval`")
    if options.include_path is None:
        return
    if not expand_home(options.include_path).is_dir():
        raise UserError(f"lm_eval.include_path={options.include_path}: no such folder")
    if not any(override.lstrip("+").lower() == TRUST for override in overrides):
        raise UserError(
            f"lm_eval.include_path={options.include_path}: task files may run Python code of their "
            f"folder; if you trust it, add {TRUST} to the command line"
        )
