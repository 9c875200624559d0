"""Ask a trained model: `python -m posttrain.generate RUN_OR_MODEL [PROMPT ...]`.

RUN_OR_MODEL is a run directory, a checkpoint, a PEFT adapter, a Hugging Face directory or a hub id. Prompts come from
the command line, from a file, or, without either, from the keyboard as a chat. The exported model answers through
transformers, several prompts at once, with its key-value cache; an answer ends at the token that ends a turn.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from posttrain import stop
from posttrain.errors import RunFailed, UserError
from posttrain.generation import Sampling, check_fits, continuations, stop_tokens
from posttrain.visible import visible


class Answerer:
    """A loaded model that answers conversations.

    Args:
        model, tokenizer: as posttrain.exported.load gives them.
        sampling: how to choose tokens.
        batch_size: conversations at once.
    """

    def __init__(self, model: Any, tokenizer: Any, sampling: Sampling, batch_size: int = 8) -> None:
        self.model, self.tokenizer, self.sampling, self.batch_size = model, tokenizer, sampling, batch_size
        self.stop = stop_tokens(model, tokenizer)
        self.pad = next(i for i in (tokenizer.pad_token_id, *sorted(self.stop), 0) if i is not None)

    def __call__(self, conversations: list[list[dict[str, str]]]) -> list[str]:
        """The next message of each conversation."""
        prompts = [self.ids(messages) for messages in conversations]
        check_fits(self.model, prompts, more=1)
        found = dict(continuations(self.model, prompts, self.stop, self.pad, self.sampling, self.batch_size))
        return [self.tokenizer.decode(found[index], skip_special_tokens=True) for index in range(len(prompts))]

    def ids(self, messages: list[dict[str, str]]) -> list[int]:
        """A prompt's tokens; without a chat template the last message is continued as plain text."""
        if not self.tokenizer.chat_template:
            return self.tokenizer(encodable(messages[-1]["content"]))["input_ids"]
        messages = [{**message, "content": encodable(message["content"])} for message in messages]
        return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]


def encodable(text: str) -> str:
    """`text` with a question mark for each half character, such as Python makes of typed bytes that are not UTF-8."""
    return text.encode("utf-8", "replace").decode("utf-8")


def read_prompts(path: Path) -> list[list[dict[str, str]]]:
    """Conversations of a file: a prompt per line, or JSON Lines of {"prompt": ...} or {"messages": [...]}.

    Raises:
        UserError: there is no such file, or a line is neither.
    """
    if not path.is_file():
        raise UserError(f"--file {path}: no such file")
    found = []
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--file {path}: can't be read: {error}") from None
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        row: Any = {"prompt": line}
        if path.suffix == ".jsonl":
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"--file {path}, line {number}: not JSON: {error}") from None
        messages = row.get("messages") if isinstance(row, dict) else None
        if messages is None and isinstance(row, dict) and isinstance(row.get("prompt"), str):
            messages = [{"role": "user", "content": row["prompt"]}]
        if not _are_messages(messages):
            raise UserError(f'--file {path}, line {number}: needs "prompt", a text, or "messages" of role and content')
        found.append(messages)
    if not found:
        raise UserError(f"--file {path}: holds no prompt")
    return found


def _are_messages(value: Any) -> bool:
    return bool(value) and isinstance(value, list) and all(
        isinstance(item, dict) and isinstance(item.get("role"), str) and isinstance(item.get("content"), str)
        for item in value
    )  # fmt: skip


def keyboard() -> Iterator[str]:
    """Lines typed until an empty one or the end of input."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if not line:
            return
        yield line


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m posttrain.generate", description=__doc__.splitlines()[0])
    made.add_argument("model", help="run directory, checkpoint, PEFT adapter, Hugging Face directory or hub id")
    made.add_argument("prompts", nargs="*", help="what to ask; nothing: a chat")
    made.add_argument("--file", type=Path, help='one prompt per line; .jsonl: {"prompt": ...} or {"messages": [...]}')
    made.add_argument("--system", help="system prompt")
    made.add_argument("--max-new-tokens", type=whole(1), default=256)
    made.add_argument("--temperature", type=real(0), default=0.0, help="0: the most likely token each time")
    made.add_argument("--top-p", type=real(0, 1, above=True), default=1.0,
                      help="sample from the most likely tokens of this total")  # fmt: skip
    made.add_argument("--top-k", type=whole(0), default=0, help="sample from this many tokens; 0: from all")
    made.add_argument("--repetition-penalty", type=real(0, above=True), default=1.0, help="above 1: fewer repetitions")
    made.add_argument("--seed", type=int, default=0, help="of the sampling")
    made.add_argument("--batch-size", type=whole(1), default=8, help="prompts answered at once")
    made.add_argument("--json", action="store_true", help="one JSON object per answer")
    return made


def whole(least: int) -> Callable[[str], int]:
    """A whole number of at least `least`, for argparse."""

    def integer(text: str) -> int:
        if (value := int(text)) < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}")
        return value

    return integer


def real(low: float, high: float = math.inf, above: bool = False) -> Callable[[str], float]:
    """A finite number from `low`, or above it, to `high`, for argparse."""

    def number(text: str) -> float:
        value = float(text)
        if not math.isfinite(value) or value < low or value > high or (above and value == low):
            most = f", at most {high:g}" if high < math.inf else ""
            raise argparse.ArgumentTypeError(f"must be {'more than' if above else 'at least'} {low:g}{most}")
        return value

    return number


@stop.command
def main() -> None:
    """Entry point."""
    try:
        run(parser().parse_intermixed_args())
    except (UserError, RunFailed) as error:
        from posttrain.compose import fail

        fail(str(error), error.exit_code)


def run(settings: argparse.Namespace) -> None:
    """Answer the prompts of the command line and the file, or chat.

    Raises:
        UserError: the model or the file is not there, or damaged.
    """
    from posttrain import exported

    start = [{"role": "system", "content": settings.system}] if settings.system else []
    batch = [[*start, {"role": "user", "content": prompt}] for prompt in settings.prompts]
    if settings.file is not None:
        batch += [[*start, *messages] for messages in read_prompts(settings.file)]
    sampling = Sampling(settings.max_new_tokens, settings.temperature, settings.top_p, settings.top_k,
                        settings.repetition_penalty, settings.seed)  # fmt: skip
    with exported.opened(settings.model) as directory:
        answerer = Answerer(*exported.load(directory), sampling, settings.batch_size)
    if batch:
        for messages, text in zip(batch, answerer(batch), strict=True):
            show(messages[-1]["content"], text, settings.json)
        return
    history = start
    for prompt in keyboard():
        history = [*history, {"role": "user", "content": prompt}]
        text = answerer([history])[0]
        history.append({"role": "assistant", "content": text})
        show(prompt, text, settings.json)


def show(prompt: str, text: str, as_json: bool) -> None:
    """Print one answer; on a terminal nothing that a model says acts on it."""
    line = json.dumps({"prompt": prompt, "answer": text}, ensure_ascii=False) if as_json else text
    print(visible(line) if sys.stdout.isatty() else line, flush=True)


if __name__ == "__main__":
    main()
