"""The files of a tokenizer, which may come from a stranger: those that are read and copied, and no others."""

from pathlib import Path

from posttrain.models.headers import own_file

# Every file that a fast tokenizer is made of.
FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "chat_template.json",
)
TEMPLATES = "additional_chat_templates"


def check_files(directory: Path) -> None:
    """See that the files of a model directory besides its weights are its own.

    Raises:
        UserError: one of them is a link that leads elsewhere, is no regular file, or is too large.
    """
    for name in (*FILES, "config.json", "generation_config.json"):
        own_file(directory / name)
    own_file(directory / TEMPLATES, folder=True)
    for file in (directory / TEMPLATES).glob("*.jinja"):
        own_file(file)
