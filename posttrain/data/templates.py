"""How a conversation becomes text: the object of the config group `template`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from posttrain.errors import UserError
from posttrain.utils.atomic_files import read_text
from posttrain.utils.user_paths import expand_home


@dataclass
class ChatTemplate:
    """A Jinja chat template, the tokenizer's own or one of ours.

    Attributes:
        name: what to call it in messages.
        jinja: the template. None: the tokenizer's `chat_template`.
        file: a file that holds the template, instead of `jinja`.
        bos: "never", "always", or "auto" (where the tokenizer itself puts one before plain text): whether the
            beginning-of-sequence token is put before the rendered text. Never for the tokenizer's own template.
        special_tokens: tokens that the text is made of and that the tokenizer must know as special.
        add_special_tokens: give the tokenizer those it lacks; the embedding is resized.
        stop_tokens: tokens that end an assistant's turn, besides those found at the end of a rendered conversation.
        require_stop: refuse an assistant's turn that no stop token ends.
        parse_content: read special tokens written in messages as such, not as plain text.
        variables: further variables for the template, e.g. {enable_thinking: false}.
    """

    name: str = "model"
    jinja: str | None = None
    file: str | None = None
    bos: str = "never"
    special_tokens: Sequence[str] = ()
    add_special_tokens: bool = False
    stop_tokens: Sequence[str] = ()
    require_stop: bool = True
    parse_content: bool = False
    variables: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if self.bos not in ("auto", "always", "never"):
            raise UserError(f"template.bos={self.bos}: must be auto, always or never")
        if self.jinja is not None and self.file is not None:
            raise UserError("template.file: template.jinja is set as well; set one of them to null")
        if self.name == "custom" and self.jinja is None and self.file is None:
            raise UserError("template.file: give the file of the template (or template.jinja, its text)")

    def read(self) -> str:
        """The text of `file`.

        Raises:
            UserError: it can't be read.
        """
        assert self.file is not None
        try:
            return read_text(expand_home(self.file)).removeprefix("\ufeff")
        except OSError as error:
            raise UserError(f"template.file={self.file}: {error.strerror or error}") from None
        except UnicodeDecodeError as error:
            raise UserError(f"template.file={self.file}: not UTF-8 text: {error}") from None
        except ValueError as error:  # a zero byte in the name
            raise UserError(f"template.file={self.file!r}: {error}") from None

    def source(self, tokenizer) -> str:
        """The Jinja text for `tokenizer`; what `tokenizer.chat_template` has to be for the trained model.

        Raises:
            UserError: there is none, or the file can't be read.
        """
        text = self.jinja if self.file is None else self.read()
        if text is None:
            text = tokenizer.chat_template
            if isinstance(text, dict):
                text = text.get("default")
        if not text:
            raise UserError(
                f"template={self.name}: the tokenizer has no chat template of its own; choose one, e.g. template=chatml"
            )
        if self.bos == "always" or (self.bos == "auto" and adds_bos(tokenizer)):
            text = "{{ bos_token }}" + text
        return text

    def prepare(self, tokenizer) -> int:
        """Make sure that `tokenizer` knows the special tokens.

        Returns:
            The number of tokens added to `tokenizer` (in place); the model's embedding must grow by as many rows
            unless it has spare ones.

        Raises:
            UserError: tokens are missing and `add_special_tokens` is off.
        """
        known = {token.content for token in tokenizer.backend_tokenizer.get_added_tokens_decoder().values()}
        unknown = [token for token in self.stop_tokens if token not in known and token not in self.special_tokens]
        if unknown:
            raise UserError(f"template.stop_tokens: {', '.join(unknown)}: not a special token of the tokenizer")
        missing = [token for token in self.special_tokens if token not in known]
        if not missing:
            return 0
        if not self.add_special_tokens:
            raise UserError(
                f"template={self.name}: the tokenizer lacks the special tokens {', '.join(missing)}. "
                "template.add_special_tokens=true adds them (new, untrained embedding rows); or choose another template"
            )
        from tokenizers import AddedToken

        return tokenizer.add_tokens(
            [AddedToken(token, special=True, normalized=False) for token in missing], special_tokens=True
        )


def adds_bos(tokenizer) -> bool:
    """Whether the tokenizer puts its BOS before plain text by itself."""
    bos = tokenizer.bos_token_id
    ids = tokenizer.backend_tokenizer.encode("a").ids
    return bos is not None and bool(ids) and ids[0] == bos
