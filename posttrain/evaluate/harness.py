"""Tasks of lm-eval (https://github.com/EleutherAI/lm-evaluation-harness) with the model that is loaded; offline."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from posttrain.errors import UserError

TRUST = "lm_eval.trust_include_path=true"


def check(options: DictConfig, words: list[str]) -> None:
    """What can be refused before the model is loaded.

    Args:
        options: conf/evaluate.yaml's `lm_eval`.
        words: of the command line; trust must be said there, a configuration from a stranger can't.

    Raises:
        UserError: lm-eval is missing, or the folder is, or it is not trusted.
    """
    from importlib.util import find_spec

    if find_spec("lm_eval") is None:
        raise UserError("lm_eval.tasks: lm-eval is not installed; run `uv sync --extra eval`")
    if options.include_path is None:
        return
    if not Path(options.include_path).expanduser().is_dir():
        raise UserError(f"lm_eval.include_path={options.include_path}: there is no such folder")
    if not any(word.lstrip("+").lower() == TRUST for word in words):
        raise UserError(
            f"lm_eval.include_path={options.include_path}: task files may run Python code of their folder; if you "
            f"trust it, add {TRUST} to the command line"
        )


def run(model: Any, tokenizer: Any, options: DictConfig) -> dict[str, Any]:
    """Evaluate the tasks.

    Args:
        model, tokenizer: as posttrain.exported.load gives them.
        options: conf/evaluate.yaml's `lm_eval`.

    Returns:
        task -> metric -> value, with the harness' own names (`acc,none`, `acc_stderr,none`), and `samples`, the
        number of questions.

    Raises:
        UserError: an unknown task, or one whose data set is not on this machine.
    """
    import difflib

    import datasets
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    datasets.config.HF_HUB_OFFLINE = datasets.config.HF_DATASETS_OFFLINE = True  # no task fetches anything by itself
    include = str(Path(options.include_path).expanduser()) if options.include_path else None
    names = list(options.tasks)
    manager = TaskManager(include_path=include, include_defaults=False) if include else None
    if manager is None or not all(manager.match_tasks([name]) for name in names):
        manager = TaskManager(include_path=include)  # with the thousands that lm-eval brings: seconds to list
    for name in names:
        if not manager.match_tasks([name]):
            close = difflib.get_close_matches(name, manager.all_tasks, n=1)
            meant = f"; did you mean {close[0]}?" if close else ""
            raise UserError(f"lm_eval.tasks: lm-eval knows no task {name}{meant}")
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=options.batch_size)
    try:
        found = lm_eval.simple_evaluate(
            model=wrapped, tasks=names, task_manager=manager, num_fewshot=options.num_fewshot, limit=options.limit,
            apply_chat_template=options.chat_template, log_samples=False, bootstrap_iters=0,
        )  # fmt: skip
    except (ConnectionError, FileNotFoundError, datasets.exceptions.DatasetNotFoundError) as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise UserError(f"lm_eval.tasks: a data set is not on this machine and nothing is fetched: {reason}") from error
    counts = found["n-samples"]
    return {
        task: {key: value for key, value in values.items() if isinstance(value, int | float) and key != "sample_len"}
        | {"samples": counts.get(task, {}).get("effective")}
        for task, values in found["results"].items()
    }
