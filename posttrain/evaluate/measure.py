"""What is measured on one set: loss and perplexity, scored answers, both by category and by source too."""

import math
import time
from collections.abc import Callable, Iterable
from typing import Any

from omegaconf import DictConfig
from rich.console import Console
from rich.progress import track

from posttrain.errors import UserError
from posttrain.evaluate.losses import losses
from posttrain.evaluate.rows import Rows, last_answer
from posttrain.generation import Sampling, check_fits, continuations, stop_tokens

STDERR = Console(stderr=True)


def measure(model: Any, tokenizer: Any, rows: Rows, options: DictConfig, metric: Any, name: str) -> tuple[dict, list]:
    """Evaluate one set.

    Args:
        model, tokenizer: as posttrain.exported.load gives them.
        rows: the set.
        options: conf/evaluate.yaml's `evaluate`.
        metric: (answer, reference) -> number; None: no answers are generated.
        name: the set's, for the screen.

    Returns:
        The set's part of result.json, and its lines of answers.jsonl.

    Raises:
        UserError: a token without an embedding; a metric and no prompts; a metric that gives no number.
    """
    check_fits(model, rows.ids)
    started = time.monotonic()
    results = [(0.0, 0)] * len(rows.ids)
    passes = losses(model, rows.ids, rows.masks, options.batch_tokens)
    for index, total, count in shown(passes, f"{name}: loss", len(results)):
        results[index] = total, count
    seconds, scores, lines = time.monotonic() - started, None, []
    if metric is not None:
        scores, lines = answers(model, tokenizer, rows, options, metric, name)
    groups = {"categories": rows.categories if any(rows.categories) else (), "sources": rows.sources}
    if len(set(rows.sources)) < 2:
        del groups["sources"]
    part = {"split": rows.split, **summary(range(len(results)), results, scores)}
    for kind, labels in groups.items():
        members: dict[str, list[int]] = {}
        for index, label in enumerate(labels):
            members.setdefault("(none)" if label is None else str(label), []).append(index)
        if members:
            part[kind] = {label: summary(found, results, scores) for label, found in sorted(members.items())}
    part["tokens"] = sum(len(ids) for ids in rows.ids)
    part["rows"] = rows.report
    part["seconds"] = {"loss": round(seconds, 3)}
    if metric is not None:
        part["seconds"]["answers"] = round(time.monotonic() - started - seconds, 3)
    return part, lines


def summary(chosen: Iterable[int], results: list[tuple[float, int]], scores: list[float | None] | None) -> dict:
    """Loss per trained token and its exponential over some conversations; the mean score of their answers."""
    chosen = list(chosen)
    total, count = sum(results[index][0] for index in chosen), sum(results[index][1] for index in chosen)
    loss = total / count
    found = {"loss": loss, "perplexity": perplexity(loss), "conversations": len(chosen)}
    found["trained_tokens"] = count
    if scores is not None:
        given = [scores[index] for index in chosen if scores[index] is not None]
        found |= {"score": sum(given) / len(given) if given else None, "answers": len(given)}
    return found


def pooled(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Several sets' results as if they were one set."""
    tokens, given = sum(part["trained_tokens"] for part in parts), sum(part.get("answers", 0) for part in parts)
    loss = sum(part["loss"] * part["trained_tokens"] for part in parts) / tokens
    found = {"loss": loss, "perplexity": perplexity(loss), "trained_tokens": tokens}
    found["conversations"] = sum(part["conversations"] for part in parts)
    if given:
        found |= {"score": sum((part["score"] or 0) * part["answers"] for part in parts) / given, "answers": given}
    return found


def perplexity(loss: float) -> float:
    """exp(loss), infinite where a float can't hold it."""
    return math.exp(loss) if loss < 700 else math.inf


def answers(
    model: Any, tokenizer: Any, rows: Rows, options: DictConfig, metric: Callable[[str, str], float], name: str
) -> tuple[list[float | None], list[dict[str, Any]]]:
    """Answer what stands before each conversation's last trained span, and score it against that span."""
    pairs = {index: pair for index in range(len(rows.ids)) if (pair := last_answer(rows.ids[index], rows.masks[index]))}
    if not pairs:
        raise UserError("metric: nothing stands before the trained tokens, so nothing can be asked; see data.train_on")
    stop = stop_tokens(model, tokenizer)
    special = set(tokenizer.all_special_ids)
    stop |= {reference[-1] for _, reference in pairs.values() if reference[-1] in special}
    pad = next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)
    sampling = Sampling(options.max_new_tokens, options.temperature, options.top_p)
    indices, lines = list(pairs), {}
    scores: list[float | None] = [None] * len(rows.ids)
    prompts = [prompt for prompt, _ in pairs.values()]
    found = continuations(model, prompts, stop, pad, sampling, options.batch_size)
    for place, ids in shown(found, f"{name}: answers", len(prompts)):
        index = indices[place]
        prompt, reference = pairs[index]
        text, wanted = (tokenizer.decode(part, skip_special_tokens=True) for part in (ids, reference))
        scores[index] = scored(metric, text, wanted)
        lines[index] = {
            "set": name, "category": rows.categories[index], "prompt": tokenizer.decode(prompt), "answer": text,
            "reference": wanted, "score": scores[index], "stopped": len(ids) < options.max_new_tokens,
        }  # fmt: skip
    return scores, [lines[index] for index in sorted(lines)]


def scored(metric: Callable[[str, str], float], answer: str, reference: str) -> float:
    """One score; an error of a metric of the user's is told as one."""
    try:
        return float(metric(answer, reference))
    except UserError:
        raise
    except Exception as error:  # whatever code of the user's raises
        raise UserError(f"metric: {type(error).__name__} for the answer {answer[:80]!r}: {error}") from error


def shown(found: Iterable[Any], title: str, count: int) -> Iterable[Any]:
    """`found` with a line on stderr where that is a terminal."""
    return track(found, title, count, console=STDERR, transient=True, disable=not STDERR.is_terminal)
