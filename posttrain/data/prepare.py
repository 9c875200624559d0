"""Conversations to token ids and masks: which messages are trained, what is too long, what is left out and why."""

import hashlib
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

from posttrain.data import fingerprint
from posttrain.data.conversation import Conversation, Document, RowError
from posttrain.data.encode import Encoded, Encoder, Rendered
from posttrain.data.presence import CONTEXT_REASONING, LOST_REASONING, find_unread
from posttrain.data.provenance import Span
from posttrain.data.readers import Place
from posttrain.data.render import Renderer
from posttrain.data.row_filter import LeftOut
from posttrain.data.rules import Rules
from posttrain.data.trace import REASONING, holds
from posttrain.data.turns import one_by_one, shorter
from posttrain.errors import UserError
from posttrain.utils.escape import shorten

if TYPE_CHECKING:
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerFast


# Rows per call of the tokenizer: enough to keep its threads busy, few enough to stay small in memory.
BATCH = 512
ANSWERS = (*REASONING, "tool_plan")  # what makes an answer of a message, besides text and calls
MOST_UNREAD = 50  # fields that are counted each by itself
CHARACTERS = 32 << 20  # of those rows, but for what the last one has beyond it: a row may be as large as 64 MiB


@dataclass
class Counts:
    """Rows and conversations read, conversations kept and dropped.

    `split` counts the conversations that were split into turns, and `turns` those that they became.
    `unread` counts, by field, the conversations in which something is neither trained nor shown to the model nor known
    as metadata. `examples` holds the first row of each reason and field.
    """

    rows: int = 0
    read: int = 0
    kept: int = 0
    truncated: int = 0
    split: int = 0
    turns: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    unread: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def drop(self, reason: str, place: Place, detail: str | None = None) -> None:
        self.dropped[reason] += 1
        self.examples.setdefault(reason, f"{place}: {detail or reason}")

    def leave_unread(self, name: str, value: object, place: Place) -> None:
        """Count what is in a row and not in its text; of very many fields only the first are told apart."""
        if name not in self.unread and len(self.unread) >= MOST_UNREAD:
            name = "further fields"
        self.unread[name] += 1
        if name not in self.examples:
            self.examples[name] = f"{place}: {shorten(repr(value), 100)}"


@dataclass(slots=True)
class Sample:
    """One sequence as it is trained; its tokens see each other and nothing else.

    Attributes:
        place: the row that it is from.
        content: what the format read there: a conversation, as far as it was kept, or a document.
        text: of its tokens; None: it isn't known, but can be decoded.
        digest: of what is rendered, an int64; equal for duplicates, which a split keeps on one side.
        encoded: ids and mask.
        tree: an int64 that is equal for samples which a split keeps on one side too; None: it is by itself.
    """

    place: Place
    content: Conversation | Document
    text: str | None
    digest: int
    encoded: Encoded
    tree: int | None = None


class RowEncoder(Protocol):
    """What an objective makes of the rows of its files.

    Attributes:
        unit, row_unit: what a sample is called, and what the format reads: "window" of a "document".
        pad_id: the token that sequences are padded with.
        identity: everything that decides the samples besides the files and their format; part of the cache's key.
    """

    unit: str
    row_unit: str
    pad_id: int

    @property
    def identity(self) -> dict[str, Any]: ...

    def samples(self, rows: Iterable[tuple[Place, Any]], counts: Counts) -> Iterator[list[Sample]]:
        """Encode rows, in batches and in order.

        Args:
            rows: what the format reads, a broken row as its RowError.
            counts: what was read, kept and dropped is added to it.

        Raises:
            UserError: a row can't be used, and that is not to be skipped.
        """
        ...


class ConversationEncoder:
    """Conversations as a chat template writes them, the messages that `rules` names supervised.

    Args:
        renderer: of the template.
        tokenizer: a Hugging Face fast tokenizer.
        rules: which messages are trained, and what happens to those that are too long or broken.
    """

    unit = "conversation"
    row_unit = "conversation"

    def __init__(self, renderer: Renderer, tokenizer: "PreTrainedTokenizerFast", rules: Rules) -> None:
        self.renderer = renderer
        self.tokenizer = tokenizer
        self.rules = rules
        self.pad_id = pad_token(tokenizer)

    @property
    def identity(self) -> dict[str, Any]:
        source = self.renderer.source
        return {
            "template": [source, self.renderer.tools_source, replace(self.renderer.template, jinja=source, file=None)],
            "today": time.strftime("%F") if "strftime_now" in source + self.renderer.tools_source else None,
            "tokenizer": fingerprint.tokenizer(self.tokenizer),
            "rules": self.rules,
        }

    def samples(self, rows: Iterable[tuple[Place, Conversation | RowError]], counts: Counts) -> Iterator[list[Sample]]:
        encoder = Encoder(self.tokenizer, self.renderer)
        return encode_conversations(rows, self.renderer, encoder, self.rules, counts)


def pad_token(tokenizer: "PreTrainedTokenizerFast") -> int:
    """The id that sequences are padded with; any will do, since padding is masked."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    return 0


def encode_conversations(
    conversations: Iterable[tuple[Place, Conversation | RowError]],
    renderer: Renderer,
    encoder: Encoder,
    rules: Rules,
    counts: Counts,
) -> Iterator[list[Sample]]:
    """Render and encode, in batches and in order.

    The next batch is rendered (Python) while the tokenizer (Rust, its own threads) works on the one before.

    Raises:
        UserError: a row can't be used and `on_error` is "error", or is too long and `truncation` is "error".
    """
    rows = _rendered(conversations, renderer, rules, counts)
    with ThreadPoolExecutor(1) as pool:
        waiting: deque[tuple[list[tuple[Place, Rendered]], Future[list[Encoding]]]] = deque()
        for batch in batches(rows):
            texts = [rendered for _, rendered in batch]
            waiting.append((batch, pool.submit(encoder.encode, texts)))
            if len(waiting) > 1:
                batch, encodings = waiting.popleft()
                yield _finished(batch, encodings.result(), renderer, encoder, rules, counts)
        while waiting:
            batch, encodings = waiting.popleft()
            yield _finished(batch, encodings.result(), renderer, encoder, rules, counts)


def _rendered(
    conversations: Iterable[tuple[Place, Conversation | RowError]], renderer: Renderer, rules: Rules, counts: Counts
) -> Iterator[tuple[Place, Rendered]]:
    last = None
    for place, conversation in conversations:
        counts.rows += place is not last
        last = place
        try:
            if isinstance(conversation, RowError):
                raise conversation
            counts.read += 1
            parts = _parts(conversation, place, renderer, rules)
        except RowError as error:
            _refuse(error, place, rules, counts)
            continue
        if not parts:
            counts.drop("nothing to train on", place)
        if len(parts) > 1:
            counts.split += 1
            counts.turns += len(parts)
        unread: dict[str, object] = {}
        for part in parts:
            for name, value in part.unread:
                unread.setdefault(name, value)
            yield place, part
        for name, value in unread.items():
            counts.leave_unread(name, value, place)


def _parts(conversation: Conversation, place: Place, renderer: Renderer, rules: Rules) -> list[Rendered]:
    """What is trained of a conversation: all of it or, by `rules.split_turns`, each turn by itself.

    Raises:
        RowError: as `render`.
    """
    whole = render(conversation, renderer, rules.train_on)
    if whole is None:
        return []
    lost = any(name == LOST_REASONING for name, _ in whole.unread)
    if rules.split_turns == "never" or (rules.split_turns == "reasoning" and not lost):
        return [whole]
    parts = []
    for turn in one_by_one(conversation, place.digest()):
        part = render(turn, renderer, rules.train_on)
        if part is not None:
            # Reasoning of earlier turns is trained in conversations of their own.
            part.unread = [(name, value) for name, value in part.unread if name != CONTEXT_REASONING]
            parts.append(part)
    return parts


class HasText(Protocol):
    """What is tokenized."""

    text: str


def batches[T: HasText](rows: Iterable[tuple[Place, T]]) -> Iterator[list[tuple[Place, T]]]:
    """Rows in lists of up to BATCH, which end early where they have CHARACTERS."""
    batch: list[tuple[Place, T]] = []
    characters = 0
    for row in rows:
        batch.append(row)
        characters += len(row[1].text)
        if len(batch) == BATCH or characters >= CHARACTERS:
            yield batch
            batch = []
            characters = 0
    if batch:
        yield batch


def _finished(
    batch: list[tuple[Place, Rendered]],
    encodings: "list[Encoding]",
    renderer: Renderer,
    encoder: Encoder,
    rules: Rules,
    counts: Counts,
) -> list[Sample]:
    samples = []
    results = encoder.finish([rendered for _, rendered in batch], encodings)
    for (place, rendered), encoded in zip(batch, results, strict=True):
        try:
            if isinstance(encoded, RowError):
                raise encoded
            if len(encoded.input_ids) > rules.max_length:
                shorter = _truncate(place, rendered, len(encoded.input_ids), renderer, encoder, rules, counts)
                if shorter is None:
                    continue
                rendered, encoded = shorter
        except RowError as error:
            _refuse(error, place, rules, counts)
            continue
        if not encoded.mask[1:].any():  # the first token has nothing before it to be predicted from
            counts.drop("nothing to train on", place)
            continue
        counts.kept += 1
        conversation = rendered.conversation
        text = str.__str__(rendered.text)
        samples.append(Sample(place, conversation, text, digest(text), encoded, conversation.tree))
    return samples


def stops_run(error: RowError, on_error: str) -> bool:
    """Whether a row that can't be used ends a run; one that was not chosen never does."""
    return on_error == "error" and not isinstance(error, LeftOut)


def refusal(place: Place, error: RowError) -> UserError:
    """The error of a run that stops because of a row."""
    return UserError(f"{place}: {error.reason}\ndata.on_error=skip leaves such rows out and counts them")


def _refuse(error: RowError, place: Place, rules: Rules, counts: Counts) -> None:
    if stops_run(error, rules.on_error):
        raise refusal(place, error) from None
    counts.drop(error.kind, place, error.reason)


def render(conversation: Conversation, renderer: Renderer, train_on: str) -> Rendered | None:
    """The text and the characters to train; None where there is nothing to train on.

    Raises:
        RowError: the conversation can't be rendered, or a trained message not be located.
    """
    if not conversation.messages:
        raise RowError("there are no messages")
    trained = messages_to_train(conversation, train_on)
    if not trained:
        return None
    text = renderer.closed(conversation, renderer.render(conversation))
    guarded = renderer.special_text(conversation)
    if train_on == "all":
        untrained = {index for index, message in enumerate(conversation.messages) if message.train is False}
        spans = None
        if untrained:
            spans = _without(text, untrained)
    else:
        spans = renderer.trained(conversation, text, trained)
    unread = find_unread(conversation, text, trained, renderer)
    return Rendered(conversation, text, spans, guarded, unread=unread)


def digest(text: str) -> int:
    """64 bits of what is rendered, equal for duplicates: the unit of the train / validation split."""
    return int.from_bytes(
        hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little", signed=True
    )


def messages_to_train(conversation: Conversation, train_on: str) -> list[int]:
    """Indices of the messages to train, ascending. Empty answers are never trained."""
    indices = []
    answers = []
    for index, message in enumerate(conversation.messages):
        if message.role == "assistant":
            answers.append(index)
        if message.train is False:
            continue
        if train_on == "all" or message.role == "assistant":
            if message.content.strip() or message.tool_calls or any(holds(message.extra.get(key)) for key in ANSWERS):
                indices.append(index)
        elif message.train:
            raise RowError(
                f"messages[{index}] asks to be trained, but its role is {message.role}; data.train_on=all trains every "
                "role, a weight of 0 leaves it out",
                "a message that is not the assistant's asks to be trained",
            )
    if train_on == "last":
        return [index for index in indices if index == answers[-1]]
    return indices


def _without(text: str, untrained: set[int]) -> list[tuple[int, int]]:
    """Everything but the text of some messages."""
    spans: tuple[Span, ...] = getattr(text, "spans", ())
    others, at = [], 0
    for start, end, source, _ in spans:
        if source.message in untrained:
            others.append((at, start))
            at = end
    return [*others, (at, len(text))]


def _truncate(
    place: Place,
    rendered: Rendered,
    length: int,
    renderer: Renderer,
    encoder: Encoder,
    rules: Rules,
    counts: Counts,
) -> tuple[Rendered, Encoded] | None:
    """The longest run of whole turns that fits; None where the conversation is dropped.

    Cut on the right, the first turns up to an answer stay; on the left, the system prompt and the last turns from a
    user's message on. Lengths grow with the number of turns, so a binary search finds it.
    """
    if rules.truncation == "error":
        raise UserError(
            f"{place}: {length} tokens, more than data.max_length={rules.max_length}; raise it and trainer.seq_length, "
            "or set data.truncation=truncate or drop"
        )
    if rules.truncation == "drop":
        counts.drop("longer than max_length", place, f"{length} tokens")
        return None
    options = shorter(rendered.conversation, rules.truncation_side)
    best, low, high = None, 0, len(options)
    while low < high:
        middle = (low + high) // 2
        candidate = _encode_one(options[middle], renderer, encoder, rules)
        if candidate is None:
            low = middle + 1
        elif len(candidate[1].input_ids) <= rules.max_length:
            best, low = candidate, middle + 1
        else:
            high = middle
    if best is None:
        counts.drop("longer than max_length, even its shortest whole turn", place, f"{length} tokens")
        return None
    counts.truncated += 1
    return best


def _encode_one(
    conversation: Conversation, renderer: Renderer, encoder: Encoder, rules: Rules
) -> tuple[Rendered, Encoded] | None:
    """A conversation's text and ids; None where it has nothing to train on, or can't be rendered."""
    try:
        rendered = render(conversation, renderer, rules.train_on)
    except RowError:
        return None
    if rendered is None:
        return None
    encoded = encoder([rendered])[0]
    return None if isinstance(encoded, RowError) else (rendered, encoded)
