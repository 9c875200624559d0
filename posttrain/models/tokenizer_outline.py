"""What rendering asks of a tokenizer, read from its files without transformers, whose import takes seconds."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.models.headers import own_file, read_json
from posttrain.models.tokenizer_files import check_files
from posttrain.utils.atomic_files import read_text

SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class Token:
    """A token that is never split."""

    content: str
    special: bool


@dataclass(frozen=True)
class NoIds:
    """The encoding of a text that nobody encodes."""

    ids: Sequence[int] = ()


class TokenizerOutline:
    """A tokenizer's template and special tokens, under the names that transformers gives them. It encodes nothing.

    Close to the tokenizer, not equal to it: what it leads to is to be confirmed with the tokenizer itself.

    Args:
        directory: of the tokenizer's files.

    Raises:
        UserError: a file is missing or broken.
    """

    bos_token_id = None

    def __init__(self, directory: Path) -> None:
        check_files(directory)
        self.name_or_path = str(directory)
        config = read_json(directory / "tokenizer_config.json")
        self._tokens: list[Token] = []
        for token in read_json(directory / "tokenizer.json").get("added_tokens") or []:
            self._tokens.append(Token(token["content"], bool(token.get("special"))))
        self.special_tokens_map: dict[str, str] = {}
        for name in SPECIAL:
            token = config.get(name)
            content = token.get("content") if isinstance(token, dict) else token
            if isinstance(content, str):
                self.special_tokens_map[name] = content
        self.eos_token = self.special_tokens_map.get("eos_token")
        self.chat_template = _chat_template(directory, config)
        self.backend_tokenizer = self

    def get_added_tokens_decoder(self) -> dict[int, Token]:
        """The tokens that are never split, by a number."""
        return dict(enumerate(self._tokens))

    def add_tokens(self, tokens: Sequence[Any], special_tokens: bool = False) -> int:
        """Know further tokens; return how many."""
        self._tokens += [Token(token.content, special_tokens) for token in tokens]
        return len(tokens)

    def encode(self, text: str) -> NoIds:
        """No ids."""
        return NoIds()


def _chat_template(directory: Path, config: dict[str, Any]) -> Any:
    """The template, or several by name; None: there is none."""
    file = directory / "chat_template.jinja"
    if file.is_file():
        own_file(file)
        return read_text(file)
    template = config.get("chat_template")
    if template is None and (directory / "chat_template.json").is_file():
        template = read_json(directory / "chat_template.json").get("chat_template")
    if isinstance(template, list):
        return {each["name"]: each["template"] for each in template}
    return template
