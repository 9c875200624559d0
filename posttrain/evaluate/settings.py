"""Keys of conf/evaluate.yaml, and the configuration of each set: the words of training over a run's own. No torch."""

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import OverrideParseException
from omegaconf import MISSING, DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from posttrain import compose, schema, yaml_file
from posttrain.errors import UserError

# What a run says itself unless a word says otherwise: what decides which tokens are measured, and how exactly.
OF_RUN = ("data", "template", "precision", "seed", "cache_dir", "trainer")


@dataclass
class EvaluateSchema:
    """conf/evaluate.yaml."""

    split: str = schema.ranged("auto", choices=["auto", "validation", "train"])
    sets: Any = None  # name -> words
    by: str | None = "category"
    limit: int | None = schema.ranged(None, ge=1)
    batch_tokens: int = schema.ranged(4096, ge=1)
    batch_size: int = schema.ranged(8, ge=1)
    max_new_tokens: int = schema.ranged(256, ge=1)
    temperature: float = schema.ranged(0.0, ge=0)
    top_p: float = schema.ranged(1.0, gt=0, le=1)
    out: str = MISSING


@dataclass
class LMEvalSchema:
    """lm-eval's part of conf/evaluate.yaml."""

    tasks: list[str] = field(default_factory=list)
    include_path: str | None = None
    trust_include_path: bool = False
    num_fewshot: int | None = schema.ranged(None, ge=0)
    limit: int | None = schema.ranged(None, ge=1)
    batch_size: int = schema.ranged(8, ge=1)
    chat_template: bool = False


@dataclass
class EvaluateConfig(schema.Config):
    """The configuration of a run, and what to measure."""

    evaluate: EvaluateSchema = field(default_factory=EvaluateSchema)
    lm_eval: LMEvalSchema = field(default_factory=LMEvalSchema)
    metric: Any = MISSING


ConfigStore.instance().store(name="schema_evaluate", node=EvaluateConfig)


def run_of(what: str) -> Path | None:
    """The run directory that `what` is, or is the export or a checkpoint of; None: it is of no run."""
    path = Path(what).expanduser().absolute()
    return next((d for d in (path, *list(path.parents)[:2]) if (d / "config.yaml").is_file()), None)


def with_run(cfg: DictConfig, run_dir: Path) -> DictConfig:
    """`cfg` with what the run in `run_dir` was trained with; see OF_RUN."""
    frozen, merged = yaml_file.read(run_dir / "config.yaml"), cfg.copy()
    try:
        with open_dict(merged):
            for key in ("data", "template", "seed", "cache_dir"):
                merged[key] = frozen[key]
        merged.precision.name = frozen.precision.name
        merged.trainer.seq_length = frozen.trainer.seq_length
    except (OmegaConfBaseException, AttributeError, KeyError) as error:
        raise UserError(f"{run_dir / 'config.yaml'}: not the configuration of a run: {error}") from None
    return merged


def of_run(word: str) -> bool:
    """Whether a word of the command line is about what a run says itself."""
    return word.lstrip("+~").partition("=")[0].partition(".")[0] in OF_RUN


def refuse_model(words: list[str]) -> None:
    """Raise a UserError where a word is about the model: it would be ignored, and the numbers be another model's."""
    for word in words:
        if word.lstrip("+~").partition("=")[0].partition(".")[0] == "model":
            raise UserError(
                f"`{word}`: what is evaluated is the first word: python -m posttrain.evaluate WHAT data=..."
            )


def changed(cfg: DictConfig, words: list[str]) -> DictConfig:
    """`cfg` with `words`: groups are composed anew, single values replaced.

    Raises:
        UserError: as for the same words on a command line.
    """
    try:
        parsed = OverridesParser.create().parse_overrides(words)
    except OverrideParseException as error:
        raise UserError(compose.explain(error, words)) from None
    groups = {item.key_or_group for item in parsed if (compose.CONF_DIR / item.key_or_group).is_dir()}
    rest = [item for item in parsed if item.key_or_group.partition(".")[0] not in groups]
    merged = cfg.copy()
    if groups:
        composed = compose.compose([item.input_line for item in parsed if item not in rest], "evaluate")
        with open_dict(merged):
            for key in groups:
                merged[key] = composed[key]
    for item in rest:
        OmegaConf.set_struct(merged, True)
        try:
            OmegaConf.update(merged, item.key_or_group, item.value(), force_add=item.is_add())
        except OmegaConfBaseException as error:
            reason = (str(error).strip() or repr(error)).splitlines()[0]
            raise UserError(f"`{item.key_or_group}={item.get_value_string()}`: {reason}") from None
    return merged


def sets(cfg: DictConfig) -> dict[str, DictConfig]:
    """The configuration of each set, by its name."""
    if not cfg.evaluate.sets:
        path = cfg.data.path
        return {Path(path).stem if isinstance(path, str) and "://" not in path else "data": cfg}
    if not isinstance(cfg.evaluate.sets, DictConfig):
        raise UserError('evaluate.sets: give names with their words: evaluate.sets={a:"data=alpaca data.path=a.json"}')
    found = {}
    for name, words in cfg.evaluate.sets.items():
        if not isinstance(words, str):
            raise UserError(f'evaluate.sets.{name}: give the words in quotes, {name}:"data=alpaca data.path=a.json"')
        try:
            split = shlex.split(words)
            refuse_model(split)
            found[str(name)] = changed(cfg, split)
        except (UserError, ValueError) as error:
            raise UserError(f"evaluate.sets.{name}: {error}") from None
    return found
