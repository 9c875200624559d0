"""Evaluate a model: `python -m posttrain.evaluate WHAT`, with training's overrides for the data.

    # a run on its own validation split
    python -m posttrain.evaluate outputs/my_run
    # any model on any data
    python -m posttrain.evaluate DIR data=alpaca data.path=my.json
    # several sets
    python -m posttrain.evaluate DIR \\
        'evaluate.datasets={a:"data=alpaca data.path=a.json",b:"data=dolly data.path=b.jsonl"}'
    # scored answers
    python -m posttrain.evaluate DIR data=custom data.path=q.jsonl \\
        metric=exact_match 'metric.extract="#### (.+)"'
    # tasks of lm-eval
    python -m posttrain.evaluate DIR lm_eval.tasks=[my_task] \\
        lm_eval.include_path=tasks lm_eval.trust_include_path=true

WHAT is a run directory, a checkpoint, a PEFT adapter, a Hugging Face directory or a hub id. For a
run, and for an export or checkpoint in one, the data, template, sequence length and precision are
the run's own unless overridden.

Every option, with a comment: conf/evaluate.yaml. Every value: python -m posttrain.evaluate WHAT
--cfg job
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from posttrain.cli import command
from posttrain.config import targets
from posttrain.config.instantiate import built
from posttrain.data.checks import check as check_data
from posttrain.errors import UserError
from posttrain.evaluate import settings
from posttrain.generate import load
from posttrain.spec import checks
from posttrain.utils import stop, working
from posttrain.utils.atomic_files import finite, write_json, write_text
from posttrain.utils.output_paths import check_directory
from posttrain.utils.user_paths import expand_home

if TYPE_CHECKING:
    from posttrain.evaluate.scores import Metric


@stop.command
def main() -> None:
    """Entry point; exits with 2 after a user's mistake."""
    overrides = sys.argv[1:]
    if not overrides or {"-h", "--help"} & set(overrides):
        command.show_help(__doc__, "evaluate")
        raise SystemExit(0 if overrides else 2)
    what = overrides.pop(0)
    is_override = "=" in what and not expand_home(what).exists()
    if what.startswith("-") or is_override:
        stop.fail(f"{what}: the first argument is what to evaluate: python -m posttrain.evaluate WHAT {what} ...")
    try:
        load.refuse_sweep(expand_home(what))
        run_dir = load.run_of(what)
    except UserError as error:
        stop.fail(str(error))
    # A run's own values are not in conf/: their overrides wait until the values are there.
    early = []
    late = []
    for override in overrides:
        if run_dir and settings.is_of_run(override) and not override.startswith("-"):
            late.append(override)
        else:
            early.append(override)
    sys.argv[1:] = early
    command.run(lambda cfg: evaluate(cfg, what, run_dir, late, overrides), config_name="evaluate")


def evaluate(cfg: DictConfig, what: str, run_dir: Path | None, late: list[str], overrides: list[str]) -> None:
    """Evaluate, write the results and print them.

    Args:
        cfg: composed of the overrides that are not in `late`.
        what: to evaluate.
        run_dir: the run that it is of; None: it is of none.
        late: the overrides of the run's own values.
        overrides: all of the command line.

    Raises:
        UserError: an override is wrong, or what is to be evaluated is missing or damaged.
    """
    if run_dir:
        cfg = settings.apply_overrides(settings.with_run(cfg, run_dir), late)
    datasets = choose_sets(cfg, run_dir, overrides)
    settings.refuse_model(overrides)
    metric = check_and_build(cfg, datasets, overrides)
    out = expand_home(cfg.evaluate.out)
    check_directory(out, "evaluate.out")

    with load.open_export(what) as directory:
        started = time.monotonic()
        out.mkdir(parents=True, exist_ok=True)  # fails before hours of measuring, not after
        working.phase("importing")
        from posttrain.evaluate.measure import measure_all  # loads torch and transformers, as the others
        from posttrain.evaluate.printing import print_result
        from posttrain.generate.live_model import load_model, usable_device

        device = usable_device()
        dtype = built(cfg.precision).dtype(device)
        working.phase("loading the model")
        model, tokenizer = load_model(directory, dtype)
        result: dict[str, Any] = {"model": what, "overrides": overrides, "dtype": dtype, "device": device}
        measured, answers = measure_all(model, tokenizer, cfg, datasets, metric)
        result |= measured
        result["seconds"] = round(time.monotonic() - started, 2)

    write_json(out / "result.json", result)
    written = str(out / "result.json")
    if answers:
        lines = [json.dumps(finite(answer), ensure_ascii=False) + "\n" for answer in answers]
        write_text(out / "answers.jsonl", "".join(lines))
        written += ", answers.jsonl"
    print_result(result)
    print(f"written: {written}")


def choose_sets(cfg: DictConfig, run_dir: Path | None, overrides: list[str]) -> dict[str, DictConfig]:
    """Return the sets to measure losses on: none where only lm-eval's tasks are given.

    Raises:
        UserError: neither an override nor a run says on what data.
    """
    with_data = any(settings.top_key(override) == "data" for override in overrides)
    if not cfg.evaluate.datasets and not with_data:
        if cfg.lm_eval.tasks:
            return {}
        if not run_dir:
            raise UserError(
                "data: choose what to evaluate on, e.g. data=alpaca data.path=my.json; see python -m posttrain --help"
            )
    return settings.configure_sets(cfg)


def check_and_build(cfg: DictConfig, datasets: dict[str, DictConfig], overrides: list[str]) -> "Metric | None":
    """Check everything that can be checked before a model is loaded, and return the metric."""
    for one in (cfg, *datasets.values()):
        targets.check(one)
        checks.check_ranges(one, settings.EvaluateConfig)
    for name, set_cfg in datasets.items():
        try:
            check_data(set_cfg)
        except UserError as error:
            if not cfg.evaluate.datasets:
                raise
            raise UserError(f"evaluate.datasets.{name}: {error}") from None
    settings.sampling_of(cfg.evaluate)
    if cfg.lm_eval.tasks:
        settings.check_lm_eval(cfg.lm_eval, overrides)
    if OmegaConf.is_missing(cfg.metric, "_target_"):
        raise UserError("`metric._target_`: has no value; set it to your function, my_module.score")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    return built(cfg.metric) if cfg.metric.get("_target_") else None


if __name__ == "__main__":
    main()
