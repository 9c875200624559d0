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
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.config.schema import SEEDS
from posttrain.data.conversation import Conversation, Message
from posttrain.errors import RunFailed, UserError
from posttrain.generate import load, sampling
from posttrain.generate.questions import apply_options, question, read_prompts
from posttrain.utils import stop, working
from posttrain.utils.escape import encodable, escape_control

if TYPE_CHECKING:
    from posttrain.generate.answerer import Answerer

POSITIONAL = ("model", "prompts")
CHAT = "a chat: an empty line ends it"
PIPED_CHAT = (
    "a chat: each line of standard input is its next turn, and an empty line ends it; for questions that don't follow "
    "each other: --file"
)


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
    add("--system", help="system prompt; replaces that of a row")
    add(
        "--template-variables",
        type=json_object,
        default={},
        metavar="JSON",
        help="variables of the chat template, e.g. {\"enable_thinking\": false}; before a row's and the run's own",
    )
    add(
        "--max-new-tokens",
        type=integer_between(1, sampling.MAX_NEW_TOKENS),
        default=256,
        help="of an answer, at most (default: %(default)s)",
    )
    add(
        "--temperature",
        type=number_between(0, sampling.MOST_TEMPERATURE),
        default=0.0,
        help="0: the most likely token each time (default: %(default)s)",
    )
    add(
        "--top-p",
        type=number_between(0, 1, exclusive=True),
        default=1.0,
        help="sample from the most likely tokens of this total (default: %(default)s)",
    )
    add(
        "--top-k",
        type=integer_between(0, SEEDS),
        default=0,
        help="sample from this many tokens; 0: from all (default: %(default)s)",
    )
    add(
        "--repetition-penalty",
        type=number_between(sampling.LEAST_PENALTY, sampling.MOST_PENALTY),
        default=1.0,
        help="above 1: fewer repetitions (default: %(default)s)",
    )
    add("--seed", type=integer_between(0, SEEDS), default=0, help="of the sampling (default: %(default)s)")
    add(
        "--batch-size",
        type=integer_between(1, 65_536),
        default=8,
        help="prompts answered at once (default: %(default)s)",
    )
    add("--json", action="store_true", help="one JSON object per answer")
    return parser


def json_object(text: str) -> dict[str, Any]:
    """A type for argparse: the JSON text of an object."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("must be a JSON object")
    return value


def integer_between(low: int, high: int) -> Callable[[str], int]:
    """A type for argparse: an integer of at least `low` and at most `high`."""

    def integer(text: str) -> int:
        value = int(text)
        if value < low:
            raise argparse.ArgumentTypeError(f"must be at least {low}")
        if value > high:
            raise argparse.ArgumentTypeError(f"must be at most {high}")
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
        args = build_parser().parse_intermixed_args()
        refuse_settings(args)
        answer(args)
    except (UserError, RunFailed) as error:
        stop.fail(str(error), error.exit_code)


def refuse_settings(args: argparse.Namespace) -> None:
    """Refuse a prompt that is a setting as other commands take it.

    Raises:
        UserError: one is.
    """
    for prompt in args.prompts:
        name, _, value = prompt.partition("=")
        name = name.rpartition(".")[2]
        if value and hasattr(args, name) and name not in POSITIONAL:
            option = f"--{name.replace('_', '-')}"
            raise UserError(f"{prompt}: a setting, not a prompt; of this command it is {option} {value}")


def answer(args: argparse.Namespace) -> None:
    """Answer the prompts of the command line and the file, or chat.

    Raises:
        UserError: the model or the file does not exist, or is damaged; or settings contradict each other.
    """
    how = sampling.Sampling(
        args.max_new_tokens,
        args.temperature,
        args.top_p,
        args.top_k,
        args.repetition_penalty,
        args.seed,
    )
    conversations = list(map(question, args.prompts))
    if args.file is not None:
        conversations += read_prompts(args.file)
    replaced = apply_options(conversations, args.system, args.template_variables)
    if replaced:
        note(f"--system replaces the system turn of {replaced} of {len(conversations)} prompts")
    working.begin("looking at the model")
    template = load.template_of(args.model)
    with load.open_export(args.model) as directory:
        working.phase("importing")
        from posttrain.generate.answerer import Answerer  # loads torch and transformers, as the next two
        from posttrain.generate.decoding import beyond_positions
        from posttrain.generate.live_model import load_model

        working.phase("loading the model")
        model, tokenizer = load_model(directory)
    answerer = Answerer(model, tokenizer, how, args.batch_size, template)
    if answerer.renderer is None and args.system is not None:
        raise UserError("--system: the model's tokenizer has no chat template, so a system prompt has no place")
    if not conversations:
        if sys.stdin.isatty():
            working.stop()  # what is typed would be drawn over
        chat(answerer, args.system, args.template_variables, args.json)
        return
    prompts = list(map(answerer.encode, conversations))
    too_long = beyond_positions(model, prompts)
    if too_long:
        note(too_long)
    if len(prompts) == 1:
        reply(answerer, prompts[0], conversations[0].messages[-1].content, args.json)
        return
    for conversation, text in zip(conversations, answerer(prompts), strict=True):
        print_answer(conversation.messages[-1].content, text, args.json)


def reply(answerer: "Answerer", prompt: Sequence[int], asked: str, as_json: bool) -> str:
    """Answer one prompt, on a terminal as the text comes; returns the answer.

    Args:
        answerer: the model.
        prompt: its token ids.
        asked: see `print_answer`.
        as_json: see `print_answer`.
    """
    if as_json or not sys.stdout.isatty():
        [text] = answerer([prompt])
        print_answer(asked, text, as_json)
        return text
    text = answerer.stream(prompt, lambda piece: print(escape_control(piece), end="", flush=True))
    print()
    return text


def note(text: str) -> None:
    """Say something that is no answer."""
    print(f"posttrain: {text}", file=sys.stderr, flush=True)


def chat(answerer: "Answerer", system: str | None, template_variables: Mapping[str, Any], as_json: bool) -> None:
    """Answer what is typed, each time with the whole conversation, which only a chat template can tell.

    Args:
        answerer: the model.
        system: the system prompt; None: there is none.
        template_variables: of the chat template.
        as_json: see `print_answer`.
    """
    note(CHAT if sys.stdin.isatty() else PIPED_CHAT)
    if answerer.renderer is None:
        note("the tokenizer has no chat template: each line is continued as a text, without those before it")
    history = [] if system is None else [Message("system", system)]
    for prompt in typed_lines():
        turns = [*history, Message("user", prompt)]
        text = reply(answerer, answerer.encode(Conversation(turns, variables=template_variables)), prompt, as_json)
        if answerer.renderer is not None:
            history = [*turns, Message("assistant", text)]


def print_answer(prompt: str, text: str, as_json: bool) -> None:
    """Print one answer, as text or as a JSON object.

    On a terminal, control characters are spelt out, so that none of a model's acts.
    """
    line = text
    if as_json:
        line = encodable(json.dumps({"prompt": prompt, "answer": text}, ensure_ascii=False))
    if sys.stdout.isatty():
        line = escape_control(line)
    print(line, flush=True)


if __name__ == "__main__":
    main()
