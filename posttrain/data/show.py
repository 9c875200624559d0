"""Conversations and statistics for people: in the terminal and as a page."""

import html
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from posttrain.data.prepare import Sample
from posttrain.visible import visible


@dataclass(frozen=True, slots=True)
class Token:
    """One token as it is shown."""

    text: str
    id: int
    trained: bool
    special: bool


@dataclass(frozen=True, slots=True)
class Chat:
    """One conversation as it is shown."""

    name: str
    tokens: list[Token]


def chat(sample: Sample, tokenizer: Any) -> Chat:
    """A sample's tokens with the text of each."""
    core = tokenizer.backend_tokenizer
    special = {index for index, token in core.get_added_tokens_decoder().items() if token.special}
    ids = sample.encoded.input_ids.tolist()
    tokens = []
    for at, (index, trained) in enumerate(zip(ids, sample.encoded.mask.tolist(), strict=True)):
        # A token's text is what it adds to those before it: alone, its leading space or half a character is lost.
        before = ids[max(0, at - 4) : at]
        alone = core.decode(before, skip_special_tokens=False)
        together = core.decode([*before, index], skip_special_tokens=False)
        text = together[_shared(alone, together) :].replace("\ufffd", "")
        tokens.append(Token(visible(text), index, bool(trained), index in special))
    trained = sum(token.trained for token in tokens)
    return Chat(f"{sample.place}: {len(tokens)} tokens, {trained} trained", tokens)


def _shared(one: str, other: str) -> int:
    """How many characters both begin with."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    """The statistics as (name, value)."""
    counts = report["rows"]
    table = [
        ("rows read", f"{counts['rows']:,}"),
        ("conversations in them", f"{counts['read']:,}"),
        ("kept", f"{counts['kept']:,}"),
    ]
    if counts["truncated"]:
        table.append(("of them shortened", f"{counts['truncated']:,}"))
    table += [(f"dropped: {reason}", f"{count:,}") for reason, count in counts["dropped"].items()]
    for split in ("train", "validation"):
        if split not in report:
            continue
        found = report[split]
        lengths = "  ".join(f"{tokens:,} ({point}%)" for point, tokens in found["length_percentiles"].items())
        table += [
            (f"{split}: conversations", f"{found['conversations']:,}"),
            (f"{split}: tokens", f"{found['tokens']:,}"),
            (f"{split}: trained tokens", f"{found['trained_tokens']:,} ({found['trained_share']:.1%})"),
            (f"{split}: length percentiles", lengths),
            (f"{split}: sequences", f"{found['bins']:,}, {found['packing_efficiency']:.1%} filled"),
        ]
        if found.get("also_in_train"):
            table.append((f"{split}: also in train", f"{found['also_in_train']:,}"))
    if "steps_per_epoch" in report:
        table.append(("steps per epoch", f"{report['steps_per_epoch']:,}"))
    return table


def terminal(chats: Sequence[Chat], report: dict[str, Any]) -> None:
    """Print; trained tokens on green, or within ⟦ ⟧ where there is no colour, special tokens in magenta."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    plain = console.color_system is None
    for shown in chats:
        console.print(Text(f"── {visible(shown.name)} ──", "dim"))
        text, open_ = Text(), False
        for token in shown.tokens:
            if plain and token.trained != open_:
                text.append("⟦" if token.trained else "⟧")
                open_ = token.trained
            style = ("black on green" if token.trained else "") + (" bold magenta" if token.special else "")
            # A trained line end is as good as a word: show it.
            text.append(token.text.replace("\n", "↵\n") if token.trained else token.text, style or None)
        text.append("⟧" if open_ else "")
        console.print(text)
    table = rows(report)
    width = max(len(name) for name, _ in table)
    for name, value in table:
        console.print(Text.assemble((f"{name:{width}}  ", "dim"), visible(value)))
    for example in report["rows"]["examples"].values():
        console.print(Text(visible(f"dropped, for example: {example}"), "yellow"))


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1b1f24 }
pre { white-space: pre-wrap; overflow-wrap: anywhere; border: 1px solid #d0d7de; border-radius: 6px; padding: 1rem }
pre span:hover { outline: 1px solid #57606a }
.trained { background: #b7ebc3 } .special { color: #a40e9c; font-weight: 600 }
h1 { font-size: 1.3rem; overflow-wrap: anywhere }
td { padding: .1rem 1.5rem .1rem 0; vertical-align: top } td:first-child { color: #57606a }
h2 { font-size: 1rem; overflow-wrap: anywhere }
@media (prefers-color-scheme: dark) {
  body { background: #0d1117; color: #e6edf3 } pre { border-color: #30363d }
  .trained { background: #14532d } .special { color: #f0abfc } td:first-child { color: #8b949e }
}
"""


def page(title: str, chats: Sequence[Chat], report: dict[str, Any]) -> str:
    """The same as one HTML page that needs nothing else; a token's id shows when pointed at."""

    def token(shown: Token) -> str:
        kinds = " ".join(name for name in ("trained", "special") if getattr(shown, name))
        attribute = f' class="{kinds}"' if kinds else ""
        text = shown.text.replace("\n", "↵\n") if shown.trained else shown.text
        return f'<span{attribute} title="{shown.id}">{html.escape(text)}</span>'

    table = "".join(f"<tr><td>{html.escape(name)}<td>{html.escape(value)}" for name, value in rows(report))
    dropped = "".join(f"<p>dropped, for example: {html.escape(text)}" for text in report["rows"]["examples"].values())
    bodies = "".join(
        f"<h2>{html.escape(shown.name)}</h2><pre>{''.join(map(token, shown.tokens))}</pre>" for shown in chats
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        '<meta name="viewport" content="width=device-width">'
        f"<style>{_STYLE}</style><h1>{html.escape(title)}</h1>"
        f'<p><span class="trained">trained</span> <span class="special">special token</span> untrained</p>'
        f"<table>{table}</table>{dropped}{bodies}</html>\n"
    )
