"""Run tasks of lm-eval with a loaded model, offline.

https://github.com/EleutherAI/lm-evaluation-harness
"""

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from posttrain.errors import UserError
from posttrain.utils.suggest import did_you_mean

if TYPE_CHECKING:
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TRUST = "lm_eval.trust_include_path=true"


def check_options(options: DictConfig, overrides: list[str]) -> None:
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
    if not Path(options.include_path).expanduser().is_dir():
        raise UserError(f"lm_eval.include_path={options.include_path}: no such folder")
    if not any(override.lstrip("+").lower() == TRUST for override in overrides):
        raise UserError(
            f"lm_eval.include_path={options.include_path}: task files may run Python code of their "
            f"folder; if you trust it, add {TRUST} to the command line"
        )


def run_tasks(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", options: DictConfig
) -> dict[str, dict[str, float | None]]:
    """Evaluate the tasks.

    Args:
        model: as posttrain.generate.load.load_model returns it.
        tokenizer: as posttrain.generate.load.load_model returns it.
        options: conf/evaluate.yaml's `lm_eval`.

    Returns:
        task -> metric -> value, with the harness' own names (`acc,none`, `acc_stderr,none`), and
        `samples`, the number of questions.

    Raises:
        UserError: a task is unknown, or its data set is not on this machine.
    """
    import datasets
    import lm_eval

    # No task downloads anything by itself.
    datasets.config.HF_HUB_OFFLINE = True
    datasets.config.HF_DATASETS_OFFLINE = True
    names = list(options.tasks)
    manager = _find_tasks(names, options.include_path)
    wrapped = _wrap(model, tokenizer, options)
    try:
        results = lm_eval.simple_evaluate(
            model=wrapped,
            tasks=names,
            task_manager=manager,
            num_fewshot=options.num_fewshot,
            limit=options.limit,
            apply_chat_template=options.chat_template,
            log_samples=False,
            bootstrap_iters=0,
        )
    except (
        ConnectionError,
        FileNotFoundError,
        datasets.exceptions.DatasetNotFoundError,
    ) as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise UserError(
            f"lm_eval.tasks: a data set is not on this machine and nothing is downloaded: {reason}"
        ) from error
    values_by_task = {}
    for task, results_of_task in results["results"].items():
        values: dict[str, float | None] = {}
        for key, value in results_of_task.items():
            if isinstance(value, int | float) and key != "sample_len":
                values[key] = value
        values["samples"] = results["n-samples"].get(task, {}).get("effective")
        values_by_task[task] = values
    return values_by_task


def _wrap(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", options: DictConfig) -> "HFLM":
    """The model as lm-eval takes it; its chat template is rendered within the limits that training has for it."""
    from lm_eval.models.huggingface import HFLM

    from posttrain.data.conversation import RowError
    from posttrain.data.prompts import Prompts

    template = Prompts(tokenizer) if options.chat_template and tokenizer.chat_template else None

    class Model(HFLM):
        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            if template is None:
                raise UserError("lm_eval.chat_template=true: the tokenizer has no chat template")
            try:
                return template.render(chat_history, add_generation_prompt)
            except RowError:  # as HFLM does it, for templates that know no system role
                pass
            without = [message for message in chat_history if message["role"] != "system"]
            try:
                return template.render(without, add_generation_prompt)
            except RowError as error:
                raise UserError(f"lm_eval.chat_template=true: {error}") from None

    return Model(pretrained=model, tokenizer=tokenizer, batch_size=options.batch_size)


def _find_tasks(names: list[str], include_path: str | None) -> "TaskManager":
    """Return a task manager that has all the tasks.

    Raises:
        UserError: there is no such task.
    """
    from lm_eval.tasks import TaskManager

    folder = None
    if include_path:
        folder = str(Path(include_path).expanduser())
        manager = TaskManager(include_path=folder, include_defaults=False)
        if all(manager.match_tasks([name]) for name in names):
            return manager
    # With the thousands of tasks that lm-eval brings, which take seconds to list.
    manager = TaskManager(include_path=folder)
    for name in names:
        if not manager.match_tasks([name]):
            hint = did_you_mean(name, manager.all_tasks)
            raise UserError(f"lm_eval.tasks: lm-eval knows no task {name}{hint}")
    return manager
