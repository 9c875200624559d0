"""Show conversations and statistics in the terminal and as a page."""

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.text import Text

from posttrain.data.prepare import Sample
from posttrain.utils.consoles import Console
from posttrain.utils.escape import escape_control

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONTEXT = 4  # tokens before a token that it is decoded with
# What the marks mean, by whether they are brackets, for want of colour.
LEGEND = {
    True: "⟦ ⟧ around what is trained: supervised tokens, whose loss counts; all else is context only\n",
    False: "on green: what is trained, supervised tokens, whose loss counts; all else is context only\n",
}


@dataclass(frozen=True, slots=True)
class Token:
    """One token as it is shown."""

    text: str
    id: int
    supervised: bool
    special: bool


@dataclass(frozen=True, slots=True)
class Chat:
    """One conversation as it is shown."""

    name: str
    tokens: list[Token]


def to_chat(sample: Sample, tokenizer: "PreTrainedTokenizerBase") -> Chat:
    """Return a sample's tokens with the text of each."""
    core = tokenizer.backend_tokenizer
    special = set()
    for token_id, token in core.get_added_tokens_decoder().items():
        if token.special:
            special.add(token_id)
    ids = sample.encoded.input_ids.tolist()
    mask = sample.encoded.mask.tolist()
    tokens = []
    for position, token_id in enumerate(ids):
        # A token's text is what it adds to those before it: alone, it loses its leading space, or
        # its part of a character.
        context = ids[max(0, position - CONTEXT) : position]
        before = core.decode(context, skip_special_tokens=False)
        with_token = core.decode([*context, token_id], skip_special_tokens=False)
        text = with_token[_common_prefix(before, with_token) :].replace("\ufffd", "")
        tokens.append(Token(escape_control(text), token_id, bool(mask[position]), token_id in special))
    return Chat(f"{sample.place}: {len(tokens)} tokens, {sum(mask)} supervised", tokens)


def _common_prefix(one: str, other: str) -> int:
    """How many characters both begin with."""
    count = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        count += 1
    return count


def format_statistics(report: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the statistics as (name, value)."""
    counts = report["rows"]
    table = [
        ("rows read", f"{counts['rows']:,}"),
        (f"{report['row_unit']}s in them", f"{counts['read']:,}"),
        ("kept", f"{counts['kept']:,}"),
    ]
    if counts["truncated"]:
        table.append(("truncated", f"{counts['truncated']:,}"))
    for reason, count in counts["dropped"].items():
        table.append((f"dropped: {reason}", f"{count:,}"))
    for field, count in counts["unread"].items():
        table.append((f"not in the text: {field}", f"{count:,}"))
    for split in ("train", "validation"):
        if split not in report:
            continue
        counts = report[split]
        lengths = []
        for percentile, tokens in counts["length_percentiles"].items():
            lengths.append(f"{tokens:,} ({percentile}%)")
        supervised = f"{counts['supervised_tokens']:,} ({counts['supervised_share']:.1%})"
        length = f"{report['seq_length']:,} tokens"
        sequences = f"{counts['packed_sequences']:,} of {length}, {counts['packing_efficiency']:.1%} filled"
        table += [
            (f"{split}: {report['unit']}s", f"{counts['conversations']:,}"),
            (f"{split}: tokens", f"{counts['tokens']:,}"),
            (f"{split}: supervised tokens", supervised),
            (f"{split}: length percentiles", "  ".join(lengths)),
            (f"{split}: sequences", sequences),
        ]
        if counts.get("also_in_train"):
            table.append((f"{split}: also in train", f"{counts['also_in_train']:,}"))
    if "epoch" in report:
        table.append(("epoch", report["epoch"]))
    return table


def first_examples(report: dict[str, Any]) -> list[str]:
    """The first row of each reason for which rows were dropped, and of each field that is not in the text."""
    counts = report["rows"]
    lines = list(report["notes"])
    for name, example in counts["examples"].items():
        if name in counts["dropped"]:
            lines.append(f"first dropped row: {example}")
        else:
            lines.append(f"first not in the text, {name}: {example}")
    return lines


def print_chats(chats: Sequence[Chat], report: dict[str, Any]) -> None:
    """Print conversations and statistics.

    Supervised tokens are on green, or within ⟦ ⟧ where there is no colour; special tokens are magenta.
    """
    console = Console(highlight=False, soft_wrap=True)
    brackets = console.color_system is None
    for chat in chats:
        console.print(Text(f"── {escape_control(chat.name)} ──", "dim"))
        text = Text()
        within = False
        for token in chat.tokens:
            if brackets and token.supervised != within:
                text.append("⟦" if token.supervised else "⟧")
                within = token.supervised
            styles = []
            if token.supervised:
                styles.append("black on green")
            if token.special:
                styles.append("bold magenta")
            text.append(_shown_text(token), " ".join(styles) or None)
        if within:
            text.append("⟧")
        console.print(text)
    if chats:
        console.print(Text(LEGEND[brackets], "dim"))
    table = format_statistics(report)
    width = max(len(name) for name, _ in table)
    for name, value in table:
        console.print(Text.assemble((f"{name:{width}}  ", "dim"), escape_control(value)))
    for example in first_examples(report):
        console.print(Text(escape_control(example), "yellow"))


def _shown_text(token: Token) -> str:
    """A token's text; supervised line ends, which count as much as a word, are made visible."""
    return token.text.replace("\n", "↵\n") if token.supervised else token.text


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1b1f24 }
pre { white-space: pre-wrap; overflow-wrap: anywhere; border: 1px solid #d0d7de; border-radius: 6px; padding: 1rem }
pre span:hover { outline: 1px solid #57606a }
.supervised { background: #b7ebc3 } .special { color: #a40e9c; font-weight: 600 }
h1 { font-size: 1.3rem; overflow-wrap: anywhere }
td { padding: .1rem 1.5rem .1rem 0; vertical-align: top } td:first-child { color: #57606a }
h2 { font-size: 1rem; overflow-wrap: anywhere }
@media (prefers-color-scheme: dark) {
  body { background: #0d1117; color: #e6edf3 } pre { border-color: #30363d }
  .supervised { background: #14532d } .special { color: #f0abfc } td:first-child { color: #8b949e }
}
"""


def render_page(title: str, chats: Sequence[Chat], report: dict[str, Any]) -> str:
    """Return the same as one HTML page without other files; pointing at a token shows its id."""
    title = html.escape(title)
    parts = [
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>',
        '<meta name="viewport" content="width=device-width">',
        f"<style>{_STYLE}</style><h1>{title}</h1>",
        '<p><span class="supervised">supervised</span> <span class="special">special token</span> ',
        "untrained</p><table>",
    ]
    for name, value in format_statistics(report):
        parts.append(f"<tr><td>{html.escape(name)}<td>{html.escape(value)}")
    parts.append("</table>")
    for example in first_examples(report):
        parts.append(f"<p>{html.escape(escape_control(example))}")
    for chat in chats:
        parts.append(f"<h2>{html.escape(chat.name)}</h2><pre>")
        parts += map(_render_token, chat.tokens)
        parts.append("</pre>")
    parts.append("</html>\n")
    return "".join(parts)


def _render_token(token: Token) -> str:
    kinds = []
    if token.supervised:
        kinds.append("supervised")
    if token.special:
        kinds.append("special")
    attribute = f' class="{" ".join(kinds)}"' if kinds else ""
    return f'<span{attribute} title="{token.id}">{html.escape(_shown_text(token))}</span>'
