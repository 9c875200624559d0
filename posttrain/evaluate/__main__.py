"""Measure a model: `python -m posttrain.evaluate WHAT`, with the words of training for the data.

    python -m posttrain.evaluate outputs/my_run                               a run on its own validation split
    python -m posttrain.evaluate DIR data=alpaca data.path=my.json            any model on any data
    python -m posttrain.evaluate DIR 'evaluate.sets={a:"data=alpaca data.path=a.json",b:"data=dolly data.path=b.jsonl"}'
    python -m posttrain.evaluate DIR data=custom data.path=q.jsonl metric=exact_match 'metric.extract="#### (.+)"'
    python -m posttrain.evaluate DIR lm_eval.tasks=[my_task] lm_eval.include_path=tasks lm_eval.trust_include_path=true

WHAT is a run directory, a checkpoint, a PEFT adapter, a Hugging Face directory or a hub id. Of a run, and of what lies
in one, the data, template, sequence length and precision are the run's own unless a word says otherwise.

Every option, with a comment: conf/evaluate.yaml. Every value: python -m posttrain.evaluate WHAT --cfg job
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from posttrain import check, compose, targets
from posttrain.data.check import built
from posttrain.data.check import check as check_data
from posttrain.errors import UserError
from posttrain.evaluate import harness, settings
from posttrain.files import finite, write_json, write_text
from posttrain.launch import visible_gpus


def main() -> None:
    """Entry point; exits with 2 after a mistake of the user's."""
    words = sys.argv[1:]
    if not words or {"-h", "--help"} & set(words):
        print(__doc__.strip())
        raise SystemExit(0 if words else 2)
    what, words = words[0], words[1:]
    if what.startswith("-") or ("=" in what and not Path(what).expanduser().exists()):
        compose.fail(f"{what}: say first what to evaluate: python -m posttrain.evaluate WHAT {what} ...")
    run_dir = settings.run_of(what)
    # A run's own values are not in conf/: words about them wait until they are there.
    late = [word for word in words if run_dir and settings.of_run(word) and not word.startswith("-")]
    sys.argv[1:] = [word for word in words if word not in late]
    compose.run(lambda cfg: run(cfg, what, run_dir, late, words), config_name="evaluate")


def run(cfg: DictConfig, what: str, run_dir: Path | None, late: list[str], words: list[str]) -> None:
    """Evaluate.

    Args:
        cfg: composed of the words that are not in `late`.
        what: to evaluate.
        run_dir: the run that it is of; None: it is of none.
        late: the words about what the run says itself.
        words: all words of the command line.

    Raises:
        UserError: a word is wrong, or what is to be evaluated is missing or damaged.
    """
    if run_dir:
        cfg = settings.changed(settings.with_run(cfg, run_dir), late)
    sets = chosen_sets(cfg, run_dir, words)
    settings.refuse_model(words)
    metric = checked(cfg, sets, words)
    out = Path(cfg.evaluate.out).expanduser()

    from posttrain import exported

    with exported.opened(what) as directory:
        started = time.time()
        out.mkdir(parents=True, exist_ok=True)  # what can't be written is better known before hours of measuring
        import torch

        from posttrain.cache import cache_root
        from posttrain.evaluate.measure import measure, pooled
        from posttrain.evaluate.rows import read
        from posttrain.evaluate.table import show

        device = "cuda" if visible_gpus() and torch.cuda.is_available() else "cpu"
        dtype = str(built(cfg.precision).dtype(device)).removeprefix("torch.")
        model, tokenizer = exported.load(directory, dtype)
        result: dict[str, Any] = {"model": what, "words": words, "dtype": dtype, "device": device, "sets": {}}
        lines = []
        for name, one in sets.items():
            rows = read(one, tokenizer, cache_root(one.cache_dir))
            result["sets"][name], answers = measure(model, tokenizer, rows, cfg.evaluate, metric, name)
            lines += answers
        if len(sets) > 1:
            result["all"] = pooled(list(result["sets"].values()))
        if cfg.lm_eval.tasks:
            result["lm_eval"] = harness.run(model, tokenizer, cfg.lm_eval)
        result["seconds"] = round(time.time() - started, 2)

    write_json(out / "result.json", result)
    if lines:
        text = "".join(json.dumps(finite(line), ensure_ascii=False) + "\n" for line in lines)
        write_text(out / "answers.jsonl", text)
    from rich.console import Console

    show(result, Console())
    print(f"written: {out / 'result.json'}" + (", answers.jsonl" if lines else ""))


def chosen_sets(cfg: DictConfig, run_dir: Path | None, words: list[str]) -> dict[str, DictConfig]:
    """What to measure losses on: nothing where only lm-eval is asked for.

    Raises:
        UserError: no word says on what, and there is no run that does.
    """
    asked = cfg.evaluate.sets or any(word.lstrip("+~").partition("=")[0].split(".")[0] == "data" for word in words)
    if not asked and cfg.lm_eval.tasks:
        return {}
    if not asked and not run_dir:
        raise UserError("data: say on what, e.g. data=alpaca data.path=my.json; see python -m posttrain --help")
    return settings.sets(cfg)


def checked(cfg: DictConfig, sets: dict[str, DictConfig], words: list[str]) -> Any:
    """The metric, once everything that can be known before a model is loaded is known to be right."""
    for one in (cfg, *sets.values()):
        targets.check(one)
        check.ranges(one, settings.EvaluateConfig)
    for name, one in sets.items():
        try:
            check_data(one)
        except UserError as error:
            raise (UserError(f"evaluate.sets.{name}: {error}") if cfg.evaluate.sets else error) from None
    if cfg.lm_eval.tasks:
        harness.check(cfg.lm_eval, words)
    if OmegaConf.is_missing(cfg.metric, "_target_"):
        raise UserError("`metric._target_`: has no value; give your function, my_module.my_score")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    return built(cfg.metric) if cfg.metric.get("_target_") else None


if __name__ == "__main__":
    main()
