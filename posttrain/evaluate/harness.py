"""Run tasks of lm-eval with a loaded model, offline.

https://github.com/EleutherAI/lm-evaluation-harness
"""

import datasets
import lm_eval
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from omegaconf import DictConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from posttrain.data.conversation import RowError
from posttrain.data.prompts import Prompts
from posttrain.errors import UserError
from posttrain.utils.suggest import did_you_mean
from posttrain.utils.user_paths import expand_home


def run_tasks(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: DictConfig
) -> dict[str, dict[str, float | None]]:
    """Evaluate the tasks.

    Args:
        model: as posttrain.generate.live_model.load_model returns it.
        tokenizer: as posttrain.generate.live_model.load_model returns it.
        options: conf/evaluate.yaml's `lm_eval`.

    Returns:
        task -> metric -> value, with the harness' own names (`acc,none`, `acc_stderr,none`), and
        `samples`, the number of questions.

    Raises:
        UserError: a task is unknown, or its data set is not on this machine.
    """
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


def _wrap(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: DictConfig) -> HFLM:
    """The model as lm-eval takes it; its chat template is rendered within the limits that training has for it."""
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


def _find_tasks(names: list[str], include_path: str | None) -> TaskManager:
    """Return a task manager that has all the tasks.

    Raises:
        UserError: there is no such task.
    """
    folder = None
    if include_path:
        folder = str(expand_home(include_path))
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
