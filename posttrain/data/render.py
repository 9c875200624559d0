"""A conversation to text, and the characters of it that are trained, in one rendering.

What is trained of a message is the text from its first character (its reasoning or tool call, where that comes first,
with the tags that the template puts around them) to the end of the stop token after it. Both ends are read off the
marks that the rendered text carries (see provenance.py); where they can't be, the row is refused, never guessed.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jinja2

from posttrain.data.conversation import Conversation, Message, RowError
from posttrain.data.jinja import budget_of, compile_template, names_in
from posttrain.data.provenance import TOOLS, VARIABLES, Source, Span, concat, mark, without_marks
from posttrain.data.templates import ChatTemplate
from posttrain.data.trace import REASONING
from posttrain.errors import UserError

# Read by some templates within the header of a turn: not part of what is said, so not marked.
_UNMARKED = {"role", "name", "tool_call_id"}
_NOTHING = re.compile(r"(?!)")  # matches nowhere
_PROBE = [Message("user", "ping"), Message("assistant", "pong")]
_CALL = {"type": "function", "function": {"name": "probe", "arguments": {"key": "value"}}, "id": "123456789"}
_PROBE_CALL = [Message("user", "ping"), Message("assistant", "", tool_calls=[_CALL])]
_PROBE_REASONING = [Message("user", "ping"), Message("assistant", "pong", extra={REASONING[0]: "a thought"})]
_RESULT = Message("tool", "result", extra={"name": "probe", "tool_call_id": "123456789"})
_RESERVED = ("messages", "tools", "add_generation_prompt")  # variables that a row can't set


class Renderer:
    """A template bound to a tokenizer.

    Args:
        template: the chat template; missing special tokens are added to `tokenizer` if it says so.
        tokenizer: a Hugging Face fast tokenizer.

    Attributes:
        source: the Jinja text.
        tools_source: the one for conversations with tools, where the tokenizer has two; else empty.
        names: what the template may read of a message, of tools and of variables.
        writes_reasoning: whether an answer's reasoning is written where it stands at the end.
        special: regular expression of the tokenizer's special tokens; without any it matches nowhere.
        stops: the tokens that end an assistant's turn.
        ends: those of them that this template was seen to write there, the one of a plain answer first.

    Raises:
        UserError: the template is broken, needs tokens the tokenizer lacks, or ends no turn with a stop token.
    """

    def __init__(self, template: ChatTemplate, tokenizer):
        template.prepare(tokenizer)
        self.template = template
        self.source = template.source(tokenizer)
        self._compiled = compile_template(self.source, template.name)
        self._compiled_tools = self._compiled
        self.tools_source = ""
        self.names = names_in(self._compiled, self.source)
        own = tokenizer.chat_template
        if template.jinja is None and template.file is None and isinstance(own, dict) and "tool_use" in own:
            self.tools_source = own["tool_use"]
            self._compiled_tools = compile_template(self.tools_source, "tool_use")
            self.names |= names_in(self._compiled_tools, self.tools_source)
        self._reasoning_names = [name for name in REASONING if name in self.names]
        self._variables = {**tokenizer.special_tokens_map, "documents": None, **dict(template.variables)}
        added = tokenizer.backend_tokenizer.get_added_tokens_decoder().values()
        special = {token.content for token in added if token.special} | set(template.stop_tokens)
        longest_first = sorted(filter(None, special), key=lambda token: (-len(token), token))
        self.special = _NOTHING
        if longest_first:
            self.special = re.compile("|".join(map(re.escape, longest_first)))
        self._headers: list[str] = []
        self._closing: dict[bool, str] = {}  # whether an answer calls tools -> what ends it, where nothing else does
        self._encodes_arguments = True
        self.writes_reasoning = False
        self.stops = {tokenizer.eos_token} - {None} | set(template.stop_tokens)
        self.ends: list[str] = []
        self._probe()

    def _probe(self) -> None:
        """Learn from tiny conversations how this template writes an assistant's turn."""
        self._learn_arguments()
        following = {False: Message("user", "again"), True: _RESULT}
        for messages in (_PROBE, _PROBE_CALL):
            calls = messages is _PROBE_CALL
            try:
                text = self.render(Conversation(messages))
            except RowError:
                continue  # it requires a system message, or knows no tools: the rows will tell
            users = _spans_of(text, 0)
            answers = _spans_of(text, 1)
            end = max((span[1] for span in answers), default=0)
            stop = self.special.search(text, end)
            marker = None
            if not stop:
                marker = self._next_marker([*messages, following[calls]])
            if stop:
                self.stops.add(stop.group())
                self.ends.append(stop.group())
            elif marker is not None and marker in self.stops:
                self._closing[calls] = marker
                self.ends.append(marker)
            if not calls and users and answers:
                self._headers.append(text[users[-1][1] : answers[0][0]])
                if not stop and marker not in self.stops and self.template.require_stop:
                    raise UserError(self._endless(marker))
        try:
            question = Conversation(_PROBE[:1])
            plain = self.render(question)
            prompted = self.render(question, add_generation_prompt=True)
            if prompted.startswith(plain) and len(prompted) > len(plain):
                self._headers.insert(0, prompted[len(plain) :])
        except RowError:
            pass
        self._headers = [str(header) for header in self._headers if header.strip()]
        if self._reasoning_names:
            self.writes_reasoning = any(field == REASONING[0] for _, field, _ in self._shown(_PROBE_REASONING))

    def _shown(self, messages: list[Message]) -> set[Source]:
        """The sources of a conversation's text; none where the template refuses it."""
        try:
            text = self.render(Conversation(messages))
        except RowError:
            return set()
        return {source for start, end, source, _ in getattr(text, "spans", ()) if end > start}

    def _learn_arguments(self) -> None:
        """Learn whether this template encodes a call's arguments itself, as Transformers documents, or adds a text."""
        for encodes in (True, False):
            self._encodes_arguments = encodes
            for _, field, path in self._shown(_PROBE_CALL):
                within = (0, "function", "arguments")
                if field == "tool_calls" and path[:3] == within[: len(path)]:
                    return
        self._encodes_arguments = True

    def _next_marker(self, messages: list[Message]) -> str | None:
        """The special token between an answer, the last message but one, and the message after it."""
        try:
            text = self.render(Conversation(messages))
        except RowError:
            return None
        answer = _spans_of(text, len(messages) - 2)
        following = _spans_of(text, len(messages) - 1)
        if not answer or not following:
            return None
        marker = self.special.search(text, answer[-1][1], following[0][0])
        return marker.group() if marker else None

    def _endless(self, marker: str | None) -> str:
        """What is wrong with a template that ends no answer; `marker` is what begins the next message."""
        reason = (
            f"template={self.template.name}: no special token of the tokenizer follows the assistant's answer, so the "
            "model would never learn to stop. "
        )
        if marker is not None:
            return (
                f"{reason}It ends a turn by the marker of the next message: template.stop_tokens=['{marker}', ...] "
                "trains that after the last answer too; name the markers after answers and after calls"
            )
        return (
            f"{reason}End the turn with {{{{ eos_token }}}} in the template, name the token with "
            "template.stop_tokens=[...], or accept it with template.require_stop=false"
        )

    def closed(self, conversation: Conversation, text: str) -> str:
        """The text with the marker that ends a last answer, where the template leaves that to the next message."""
        if not self._closing:
            return text
        last = conversation.messages[-1]
        marker = self._closing.get(bool(last.tool_calls))
        if marker is None or last.role != "assistant":
            return text
        return concat((text, marker))

    def render(self, conversation: Conversation, add_generation_prompt: bool = False) -> str:
        """The text, `TrackedStr` with where each message's parts went.

        Raises:
            RowError: the template refuses the conversation or fails on it.
        """
        messages = []
        for index, message in enumerate(conversation.messages):
            marked = {}
            for key, value in message.for_template().items():
                if key in _UNMARKED:
                    marked[key] = value
                elif key == "tool_calls":
                    marked[key] = mark(self._calls(value), Source(index, key))
                else:
                    marked[key] = mark(value, Source(index, key))
            if REASONING[0] in marked:
                for name in self._reasoning_names:
                    marked[name] = marked[REASONING[0]]
            messages.append(marked)
        compiled, tools = self._compiled, None
        if conversation.tools:
            compiled = self._compiled_tools
            tools = mark(conversation.tools, Source(TOOLS, "tools"))
        own = conversation.variables
        if own:
            own = self._own_variables(own)
        try:
            # As compiled.render does it, without copying the environment's globals for every conversation.
            variables = {
                **compiled.globals,
                **self._variables,
                **own,
                "messages": messages,
                "tools": tools,
                "add_generation_prompt": add_generation_prompt,
            }
            budget = budget_of(compiled)
            budget.begin()
            return concat(budget.written(compiled.root_render_func(compiled.new_context(variables, shared=True))))
        except jinja2.TemplateError as error:
            raise RowError(f"the template {self.template.name} refuses it: {without_marks(str(error))}") from None
        except Exception as error:  # whatever a template does that it shouldn't is about this row
            raise RowError(
                f"the template {self.template.name} fails on it: {type(error).__name__}: {error}",
                f"the template {self.template.name} fails on it: {type(error).__name__}",
            ) from None

    @staticmethod
    def _own_variables(variables: Mapping[str, Any]) -> dict[str, Any]:
        """A row's own variables of the template, marked.

        Raises:
            RowError: one of them is what a conversation is made of.
        """
        for name in _RESERVED:
            if name in variables:
                raise RowError(f"the row's own variable `{name}`: is set by the conversation", "a reserved variable")
        return mark(dict(variables), Source(VARIABLES, "variables"))

    def _calls(self, calls: object) -> object:
        """Tool calls with their arguments as this template reads them: an object, or its JSON text."""
        if not isinstance(calls, list):
            return calls
        converted = []
        for call in calls:
            function = call.get("function") if isinstance(call, dict) else None
            if isinstance(function, dict) and "arguments" in function:
                arguments = function["arguments"]
                if self._encodes_arguments and isinstance(arguments, str):
                    arguments = _decoded(arguments)
                elif not self._encodes_arguments and not isinstance(arguments, str):
                    arguments = json.dumps(arguments, ensure_ascii=False)
                call = {**call, "function": {**function, "arguments": arguments}}
            converted.append(call)
        return converted

    def trained(self, conversation: Conversation, text: str, messages: Sequence[int]) -> list[tuple[int, int]]:
        """The characters to train.

        Args:
            conversation: what was rendered.
            text: the result of `render`.
            messages: indices of the messages to train, ascending.

        Returns:
            [(start, end)] in characters of `text`, ascending and disjoint.

        Raises:
            RowError: the text of a message can't be located with certainty.
        """
        spans = getattr(text, "spans", ())
        return [self._turn(conversation, text, spans, index) for index in messages]

    def _turn(self, conversation: Conversation, text: str, spans, index: int) -> tuple[int, int]:
        message = conversation.messages[index]
        name = f"messages[{index}] ({message.role})"
        silent = not message.content.strip()  # its place still marks where the turn begins
        own = []
        for at, (start, end, source, _) in enumerate(spans):
            if source.message == index and (end > start or (silent and source.field == "content")):
                own.append(at)
        if not own:
            raise RowError(
                f"{name}: the template {self.template.name} leaves it out or rewrites it, so its place is unknown",
                "a trained message can't be found in the rendered text",
            )
        if message.tool_calls and not any(spans[at][2].field == "tool_calls" for at in own):
            raise RowError(
                f"{name}: the template {self.template.name} leaves out its tool calls; use template=chatml",
                "the template leaves out tool calls",
            )
        first, last = own[0], own[-1]
        for start, end, source, _ in spans[first:last]:
            if source.message != index and end > start:
                raise RowError(
                    f"{name}: the template mixes it with other messages", "messages are mixed by the template"
                )
        before = max((end for _, end, source, _ in spans[:first] if source.message != index), default=0)
        after = min((start for start, _, source, _ in spans[last + 1 :] if source.message != index), default=len(text))
        start, _, source, origin = spans[first]
        gaps = _gaps([spans[at] for at in own])
        cut = any(message.content[a:b].strip() for a, b in gaps)
        if source.field != "content" or message.content[:origin].strip() or cut:
            start = self._header_end(conversation, text, index, (before, start))
        return start, self._stop_end(text, spans[last][1], after, name)

    def _header_end(self, conversation: Conversation, text: str, index: int, within: tuple[int, int]) -> int:
        """Where a turn's header ends: tags that open the reasoning or a tool call after it are trained too.

        Args:
            conversation, text: what was rendered, and the result.
            index: of the message.
            within: characters between which it ends.
        """
        for header in self._headers:
            at = text.rfind(header, *within)
            if at >= 0:
                return at + len(header)
        # What a model is given before it writes this turn; some templates have another header after a tool's result.
        try:
            earlier = replace(conversation, messages=conversation.messages[:index])
            prompt = str.__str__(self.render(earlier, add_generation_prompt=True))
        except RowError:
            prompt = ""
        if prompt and text.startswith(prompt) and within[0] <= len(prompt) <= within[1]:
            return len(prompt)
        raise RowError(
            f"messages[{index}] ({conversation.messages[index].role}): begins with a part that the template has "
            "reworked, and the turn's header is not found before it",
            "the beginning of a trained message can't be found",
        )

    def _stop_end(self, text: str, end: int, after: int, name: str) -> int:
        """The end of the stop token that closes a turn whose own text ends at `end`."""
        stop = self.special.search(text, end, after)
        if stop and stop.group() in self.stops:
            return stop.end()
        if not self.template.require_stop:
            return end
        raise RowError(
            f"{name}: no stop token ({', '.join(sorted(self.stops))}) after it; name the token that ends it with "
            "template.stop_tokens=[...], or accept it with template.require_stop=false",
            "no stop token after a trained message",
        )

    def special_text(self, conversation: Conversation) -> bool:
        """Whether a message, call or tool definition contains the text of a special token."""
        return any(self.special.search(text) for text in _texts(conversation))

    def count_special_outside(self, text: str) -> int:
        """How many special tokens the template wrote."""
        spans = getattr(text, "spans", ())
        if len(spans) < 64:  # what is left without the messages, in one search: a line end can't make a special token
            at, pieces = 0, []
            for a, b, _, _ in spans:
                if a > at:
                    pieces.append(str.__getitem__(text, slice(at, a)))
                at = max(at, b)
            pieces.append(str.__getitem__(text, slice(at, None)))
            return len(self.special.findall("\n".join(pieces)))
        return len(list(self.special_outside(text)))

    def special_outside(self, text: str) -> Iterator[re.Match[str]]:
        """The special tokens that the template wrote: those outside of every mark, in order."""
        at = 0
        for a, b, _, _ in getattr(text, "spans", ()):
            if a > at:
                yield from self.special.finditer(text, at, a)
            at = max(at, b)
        yield from self.special.finditer(text, at, len(text))

    def check_no_injection(self, conversation: Conversation, text: str, prompted: bool = False) -> None:
        """Prove that every special token outside the marks is the template's own.

        The same conversation is rendered with the special-token text in its messages made harmless: the template must
        write as many special tokens as before.

        Raises:
            RowError: text of a message reached a place that isn't marked.
        """
        harmless = self.render(_defused(conversation, self.special), prompted)
        if len(list(self.special_outside(text))) != len(list(self.special_outside(harmless))):
            raise RowError(
                f"a message holds the text of a special token, and the template {self.template.name} rewrites that "
                "message; template.parse_content=true reads it as the token",
                "special-token text in a message that the template rewrites",
            )


def _spans_of(text: str, message: int) -> list[Span]:
    """The spans of a message in a rendered text."""
    return [span for span in getattr(text, "spans", ()) if span[2].message == message]


def _gaps(spans: list[Span]) -> Iterator[tuple[int, int]]:
    """The parts of a message's text, by its characters, that stand between two parts that were written."""
    at = None
    for start, end, source, origin in spans:
        if source.field == "content" and end > start:
            if at is not None and origin > at:
                yield at, origin
            at = origin + end - start


def _decoded(arguments: str) -> object:
    """The object that a call's JSON text means; the text itself where it is none."""
    try:
        decoded = json.loads(arguments) if arguments.strip() else {}
    except (ValueError, RecursionError):
        return arguments
    return decoded if isinstance(decoded, dict) else arguments


def _texts(value: object) -> Iterator[str]:
    """Every string within a conversation or a part of it, the keys of mappings included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Conversation):
        for message in value.messages:
            yield message.content
            if message.tool_calls or message.extra:
                yield from _texts([message.tool_calls, message.extra])
        yield from _texts(value.tools)
        if value.variables:
            yield from _texts(value.variables)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield str(key)
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


def _defused(value: object, special: re.Pattern[str]) -> Any:
    """`value` with the text of special tokens replaced by as many letters."""
    if isinstance(value, Conversation):
        return replace(
            value,
            messages=[_defused(m, special) for m in value.messages],
            tools=_defused(value.tools, special),
            variables=_defused(value.variables, special),
        )
    if isinstance(value, Message):
        return replace(
            value,
            content=_defused(value.content, special),
            tool_calls=_defused(value.tool_calls, special),
            extra=_defused(value.extra, special),
        )
    if isinstance(value, str):
        return special.sub(lambda token: "x" * len(token.group()), value)
    if isinstance(value, dict):
        return {_defused(key, special): _defused(item, special) for key, item in value.items()}
    if isinstance(value, list):
        return [_defused(item, special) for item in value]
    return value
