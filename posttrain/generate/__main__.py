"""Ask a trained model: `python -m posttrain.generate RUN_OR_MODEL [PROMPT ...]`.

RUN_OR_MODEL is a run directory, a checkpoint, a PEFT adapter, a Hugging Face directory or a hub id.
Prompts come from the command line, from a file, or, without either, from the keyboard as a chat.
The exported model answers through transformers, several prompts at once, with its key-value cache;
an answer ends at the token that ends a turn.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from posttrain.errors import RunFailed, UserError
from posttrain.generate import load
from posttrain.utils import stop
from posttrain.utils.escape import escape_control

if TYPE_CHECKING:
    from posttrain.generate.answerer import Answerer

Message = dict[str, str]  # {"role": ..., "content": ...}


def read_prompts(path: Path) -> list[list[Message]]:
    """Read a file's conversations.

    It has a prompt per line, or, as .jsonl, {"prompt": ...} or {"messages": [...]} per line.

    Raises:
        UserError: there is no such file, or a line is neither.
    """
    if not path.is_file():
        raise UserError(f"--file {path}: no such file")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--file {path}: can't be read: {error}") from None
    conversations = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        if path.suffix != ".jsonl":
            conversations.append([{"role": "user", "content": line}])
            continue
        try:
            messages = _messages_of(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise UserError(f"--file {path}, line {number}: not JSON: {error}") from None
        if messages is None:
            raise UserError(
                f'--file {path}, line {number}: requires "prompt", a text, or "messages" with role and content'
            )
        conversations.append(messages)
    if not conversations:
        raise UserError(f"--file {path}: holds no prompt")
    return conversations


def _messages_of(row: object) -> list[Message] | None:
    """The conversation of a row of a .jsonl file; None: it is not one."""
    if not isinstance(row, dict):
        return None
    messages = row.get("messages")
    if messages is None and isinstance(row.get("prompt"), str):
        return [{"role": "user", "content": row["prompt"]}]
    if not isinstance(messages, list) or not messages:
        return None
    for message in messages:
        if not isinstance(message, dict):
            return None
        if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
            return None
    return messages


def typed_lines() -> Iterator[str]:
    """Yield lines from the keyboard until an empty one or the end of input."""
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            line = input(prompt).strip()
        except EOFError:
            return
        if not line:
            return
        yield line


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m posttrain.generate", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("model", help="run directory, checkpoint, PEFT adapter, Hugging Face directory or hub id")
    add("prompts", nargs="*", help="what to ask; nothing: a chat")
    add(
        "--file",
        type=Path,
        help='one prompt per line; .jsonl: {"prompt": ...} or {"messages": [...]}',
    )
    add("--system", help="system prompt")
    add("--max-new-tokens", type=integer_from(1), default=256)
    add(
        "--temperature",
        type=number_between(0),
        default=0.0,
        help="0: the most likely token each time",
    )
    add(
        "--top-p",
        type=number_between(0, 1, exclusive=True),
        default=1.0,
        help="sample from the most likely tokens of this total",
    )
    add("--top-k", type=integer_from(0), default=0, help="sample from this many tokens; 0: from all")
    add(
        "--repetition-penalty",
        type=number_between(0, exclusive=True),
        default=1.0,
        help="above 1: fewer repetitions",
    )
    add("--seed", type=int, default=0, help="of the sampling")
    add("--batch-size", type=integer_from(1), default=8, help="prompts answered at once")
    add("--json", action="store_true", help="one JSON object per answer")
    return parser


def integer_from(low: int) -> Callable[[str], int]:
    """A type for argparse: an integer of at least `low`."""

    def integer(text: str) -> int:
        value = int(text)
        if value < low:
            raise argparse.ArgumentTypeError(f"must be at least {low}")
        return value

    return integer


def number_between(low: float, high: float = math.inf, exclusive: bool = False) -> Callable[[str], float]:
    """A type for argparse: a finite number between `low` and `high`.

    Args:
        low: the least value.
        high: the greatest value.
        exclusive: whether `low` itself is too small.
    """
    requirement = f"more than {low:g}" if exclusive else f"at least {low:g}"
    if high < math.inf:
        requirement += f", at most {high:g}"

    def number(text: str) -> float:
        value = float(text)
        too_small = value <= low if exclusive else value < low
        if not math.isfinite(value) or too_small or value > high:
            raise argparse.ArgumentTypeError(f"must be {requirement}")
        return value

    return number


@stop.command
def main() -> None:
    """Entry point."""
    try:
        answer(build_parser().parse_intermixed_args())
    except (UserError, RunFailed) as error:
        stop.fail(str(error), error.exit_code)


def answer(args: argparse.Namespace) -> None:
    """Answer the prompts of the command line and the file, or chat.

    Raises:
        UserError: the model or the file does not exist, or is damaged.
    """
    start: list[Message] = []
    if args.system:
        start.append({"role": "system", "content": args.system})
    conversations = []
    for prompt in args.prompts:
        conversations.append([*start, {"role": "user", "content": prompt}])
    if args.file is not None:
        for messages in read_prompts(args.file):
            conversations.append([*start, *messages])
    from posttrain.generate.answerer import Answerer  # loads torch and transformers, as the next two
    from posttrain.generate.decoding import Sampling
    from posttrain.generate.live_model import load_model

    sampling = Sampling(
        args.max_new_tokens,
        args.temperature,
        args.top_p,
        args.top_k,
        args.repetition_penalty,
        args.seed,
    )
    with load.open_export(args.model) as directory:
        model, tokenizer = load_model(directory)
    answerer = Answerer(model, tokenizer, sampling, args.batch_size)
    if not conversations:
        chat(answerer, start, args.json)
        return
    for messages, text in zip(conversations, answerer(conversations), strict=True):
        print_answer(messages[-1]["content"], text, args.json)


def chat(answerer: "Answerer", history: list[Message], as_json: bool) -> None:
    """Answer what is typed, each time with the whole conversation.

    Args:
        answerer: the model.
        history: how the conversation starts.
        as_json: see `print_answer`.
    """
    for prompt in typed_lines():
        history.append({"role": "user", "content": prompt})
        text = answerer([history])[0]
        history.append({"role": "assistant", "content": text})
        print_answer(prompt, text, as_json)


def print_answer(prompt: str, text: str, as_json: bool) -> None:
    """Print one answer, as text or as a JSON object.

    On a terminal, control characters are spelt out, so that none of a model's acts.
    """
    line = text
    if as_json:
        line = json.dumps({"prompt": prompt, "answer": text}, ensure_ascii=False)
    if sys.stdout.isatty():
        line = escape_control(line)
    print(line, flush=True)


if __name__ == "__main__":
    main()
