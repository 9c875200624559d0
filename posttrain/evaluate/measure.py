"""Measure one set: loss and perplexity, scored answers, both by category and by source too."""

import math
import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig
from rich.console import Console

from posttrain.errors import UserError
from posttrain.evaluate.conversations import Conversations, last_answer, read_conversations
from posttrain.evaluate.losses import compute_losses
from posttrain.evaluate.scores import Metric
from posttrain.evaluate.settings import EvaluateSchema, sampling_of
from posttrain.generate.decoding import beyond_positions, check_fits, continuations, stop_tokens
from posttrain.generate.token_stream import Progress
from posttrain.utils import working
from posttrain.utils.cache import cache_root

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

STDERR = Console(stderr=True)


@dataclass
class Results:
    """What was measured, by index of the conversation.

    Attributes:
        losses: sums over the supervised tokens, in nats.
        supervised_tokens: their numbers.
        scores: of the answers, None where none was asked for; None: there is no metric.
    """

    losses: list[float]
    supervised_tokens: list[int]
    scores: list[float | None] | None = None


def measure_set(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    conversations: Conversations,
    options: DictConfig,
    metric: Metric | None,
    name: str,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Evaluate one set.

    Args:
        model: as posttrain.generate.live_model.load_model returns it.
        tokenizer: as posttrain.generate.live_model.load_model returns it.
        conversations: of the set.
        options: conf/evaluate.yaml's `evaluate`.
        metric: None: no answers are generated.
        name: the set's, for the screen.

    Returns:
        The set's part of result.json, and its lines of answers.jsonl.

    Raises:
        UserError: a token has no embedding, there is a metric but no prompt, or the metric fails.
    """
    check_fits(model, conversations.ids)
    started = time.monotonic()
    count = len(conversations.ids)
    results = Results([0.0] * count, [0] * count)
    losses = compute_losses(model, conversations.ids, conversations.masks, options.batch_tokens)
    for index, loss, supervised_tokens in working.counted(losses, f"{name}: loss", count):
        results.losses[index] = loss
        results.supervised_tokens[index] = supervised_tokens
    seconds = {"loss": round(time.monotonic() - started, 3)}
    lines: list[dict[str, Any]] = []
    generated: dict[str, Any] = {}
    if metric is not None:
        started = time.monotonic()
        results.scores, lines, progress = score_answers(model, tokenizer, conversations, options, metric, name)
        seconds["answers"] = round(time.monotonic() - started, 3)
        seconds["generating"] = round(progress.seconds, 3)
        generated = {"generated_tokens": progress.generated, "tokens_per_second": round(progress.rate, 2)}
    part = {"split": conversations.split, **summarize(range(count), results)}
    if any(conversations.categories):
        part["categories"] = summarize_groups(conversations.categories, results)
    if len(set(conversations.sources)) > 1:
        part["sources"] = summarize_groups(conversations.sources, results)
    part["tokens"] = sum(map(len, conversations.ids))
    part |= generated
    part["rows"] = conversations.report
    part["seconds"] = seconds
    return part, lines


def check_categories(column: str | None, sets: Collection[Conversations]) -> None:
    """Some row has the column that was asked for.

    Raises:
        UserError: none has.
    """
    if column in (None, EvaluateSchema.group_by) or not sets:
        return
    if not any(any(conversations.categories) for conversations in sets):
        raise UserError(
            f"`evaluate.group_by={column}`: no row has such a column; name one that rows have, or leave it out"
        )


def summarize_groups(labels: Sequence[str | int | None], results: Results) -> dict[str, dict[str, Any]]:
    """Summarize the conversations of each label."""
    members: dict[str, list[int]] = {}
    for index, label in enumerate(labels):
        name = "(none)" if label is None else str(label)
        members.setdefault(name, []).append(index)
    return {label: summarize(members[label], results) for label in sorted(members)}


def summarize(indices: Iterable[int], results: Results) -> dict[str, Any]:
    """Return loss per supervised token, perplexity and mean score of some conversations."""
    indices = list(indices)
    supervised_tokens = sum(results.supervised_tokens[index] for index in indices)
    loss = sum(results.losses[index] for index in indices) / supervised_tokens
    summary: dict[str, Any] = {
        "loss": loss,
        "perplexity": perplexity(loss),
        "conversations": len(indices),
        "supervised_tokens": supervised_tokens,
    }
    if results.scores is not None:
        scores: list[float] = []
        for index in indices:
            score = results.scores[index]
            if score is not None:
                scores.append(score)
        summary["score"] = sum(scores) / len(scores) if scores else None
        summary["answers"] = len(scores)
    return summary


def pool(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Return several sets' results as if they were one set."""
    loss = _mean(parts, "loss", "supervised_tokens")
    scored = [part for part in parts if part.get("answers")]
    pooled = {
        "loss": loss,
        "perplexity": perplexity(loss),
        "supervised_tokens": _total(parts, "supervised_tokens"),
        "conversations": _total(parts, "conversations"),
    }
    if scored:
        pooled["score"] = _mean(scored, "score", "answers")
        pooled["answers"] = _total(scored, "answers")
        pooled["generated_tokens"] = _total(scored, "generated_tokens")
        seconds = sum(part["seconds"]["generating"] for part in scored)
        pooled["tokens_per_second"] = round(pooled["generated_tokens"] / seconds, 2) if seconds else 0.0
    return pooled


def _total(parts: list[dict[str, Any]], key: str) -> int:
    return sum(part[key] for part in parts)


def _mean(parts: list[dict[str, Any]], key: str, weight: str) -> float:
    """The mean of a number, each weighted by another number of its part."""
    weighted: float = sum(part[key] * part[weight] for part in parts)
    return weighted / _total(parts, weight)


def perplexity(loss: float) -> float:
    """exp(loss), infinite where a float can't hold it."""
    return math.exp(loss) if loss < 700 else math.inf


def score_answers(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    conversations: Conversations,
    options: DictConfig,
    metric: Metric,
    name: str,
) -> tuple[list[float | None], list[dict[str, Any]], Progress]:
    """Generate an answer in place of each conversation's last supervised span, and score it.

    Returns:
        A score per conversation, None where nothing is before the supervised span; the lines of answers.jsonl; and
        the count of the answers' tokens. For the arguments see `measure_set`.
    """
    pairs: dict[int, tuple[list[int], list[int]]] = {}
    for index, ids in enumerate(conversations.ids):
        pair = last_answer(ids, conversations.masks[index])
        if pair is not None:
            pairs[index] = pair
    if not pairs:
        raise UserError("metric: nothing is before the supervised tokens, so there is no prompt; see data.train_on")
    stop = stop_tokens(model, tokenizer)
    special = set(tokenizer.all_special_ids)
    prompts = []
    for prompt, reference in pairs.values():
        prompts.append(prompt)
        if reference[-1] in special:
            stop.add(reference[-1])
    sampling = sampling_of(options)
    too_long = beyond_positions(model, prompts)
    if too_long:
        STDERR.print(f"posttrain: {name}: {too_long}", markup=False, soft_wrap=True)
    progress = Progress(sampling.max_new_tokens, len(prompts), stop, f"{name}: answers")
    generated = continuations(model, prompts, stop, _pad_token(tokenizer), sampling, options.batch_size, progress)
    indices = list(pairs)
    scores: list[float | None] = [None] * len(conversations.ids)
    lines = {}
    for position, answer_ids in generated:
        index = indices[position]
        prompt, reference_ids = pairs[index]
        answer = tokenizer.decode(answer_ids, skip_special_tokens=True)
        reference = tokenizer.decode(reference_ids, skip_special_tokens=True)
        scores[index] = compute_score(metric, answer, reference)
        lines[index] = {
            "set": name,
            "category": conversations.categories[index],
            "prompt": tokenizer.decode(prompt),
            "answer": answer,
            "reference": reference,
            "score": scores[index],
            "stopped": len(answer_ids) < options.max_new_tokens,
        }
    return scores, [lines[index] for index in sorted(lines)], progress


def _pad_token(tokenizer: "PreTrainedTokenizerBase") -> int:
    """Any valid id: padding is masked."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    return 0


def compute_score(metric: Metric, answer: str, reference: str) -> float:
    """Score one answer; errors raised by a user's metric are reported as user errors."""
    try:
        score = float(metric(answer, reference))
    except UserError:
        raise
    except Exception as error:  # whatever the user's code raises
        raise UserError(f"metric: {type(error).__name__} for the answer {answer[:80]!r}: {error}") from error
    if math.isnan(score):
        raise UserError(f"metric: returned NaN for the answer {answer[:80]!r}; the mean of a set would be none")
    return score


def measure_all(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    cfg: DictConfig,
    datasets: dict[str, DictConfig],
    metric: "Metric | None",
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Measure all sets, and run lm-eval's tasks.

    Returns:
        `datasets`, `all` and `lm_eval` of result.json, and the lines of answers.jsonl.
    """
    result: dict[str, Any] = {"datasets": {}}
    lines = []
    sets = {}
    if datasets:
        working.phase("reading data")
    for name, set_cfg in datasets.items():
        sets[name] = read_conversations(set_cfg, tokenizer, cache_root(set_cfg.cache_dir))
    check_categories(cfg.evaluate.group_by, sets.values())
    for name, conversations in sets.items():
        result["datasets"][name], answers = measure_set(model, tokenizer, conversations, cfg.evaluate, metric, name)
        lines += answers
    if len(datasets) > 1:
        result["all"] = pool(list(result["datasets"].values()))
    if cfg.lm_eval.tasks:
        from posttrain.evaluate import harness  # lm-eval is an extra

        working.phase("tasks of lm-eval")
        result["lm_eval"] = harness.run_tasks(model, tokenizer, cfg.lm_eval)
    return result, lines
