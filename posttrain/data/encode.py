"""Rendered text to token ids and a 0/1 mask per token, in batches.

A token is trained when its last character is. So a token that begins in the header and reaches into the answer (the
space of `[/INST] ` joined to the first word) is trained, and one that reaches beyond a turn's end is not.
"""

import itertools
import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import Encoding, Tokenizer

from posttrain.data.conversation import Conversation, RowError
from posttrain.data.render import Renderer
from posttrain.models.tokenizer_files import failures

FAILS = "the tokenizer fails on a text of the data"


@dataclass(slots=True)
class Rendered:
    """A conversation's text and what of it is trained; `spans` None: all of it.

    `prompted`: it ends where an answer begins.
    """

    conversation: Conversation
    text: str
    spans: list[tuple[int, int]] | None
    guarded: bool = False  # messages hold the text of special tokens, to be read as plain text
    prompted: bool = False
    unread: Sequence[tuple[str, object]] = ()  # fields of the row, and their values, that are not in the text


@dataclass(slots=True)
class Encoded:
    """Token ids int32[n] and mask uint8[n]; 1: the token is trained."""

    input_ids: np.ndarray
    mask: np.ndarray


class Encoder:
    """Encodes with `tokenizer`'s Rust core: exactly the ids of the tokenizer for the same text.

    Args:
        tokenizer: a Hugging Face fast tokenizer.
        renderer: the renderer whose texts are encoded.
    """

    def __init__(self, tokenizer, renderer: Renderer):
        self._renderer = renderer
        self._name = tokenizer.name_or_path
        self._own = tokenizer.backend_tokenizer
        # A copy costs a second and a hundred megabytes: only where the tokenizer's own would cut, pad or trim offsets.
        altered = self._own.truncation or self._own.padding or "trim_offsets=True" in str(self._own.post_processor)
        self._plain = _core(self._own.to_str()) if altered else self._own
        self._guarding: tuple[Tokenizer, dict[str, str], np.ndarray] | None = None
        size = max(len(tokenizer), 1 + max(self._plain.get_added_tokens_decoder(), default=0))
        self._is_special = np.zeros(size, dtype=bool)
        for index, token in self._plain.get_added_tokens_decoder().items():
            self._is_special[index] = token.special or token.content in renderer.template.stop_tokens

    def __call__(self, batch: Sequence[Rendered]) -> list[Encoded | RowError]:
        """Encode; a row that can't be encoded safely yields its error."""
        return self.finish(batch, self.encode(batch))

    def encode(self, batch: Sequence[Rendered]) -> list[Encoding]:
        """The tokenizer's own work on the texts of a batch, in Rust threads and without the GIL.

        Raises:
            UserError: it fails on one of them.
        """
        with failures(self._name, FAILS):
            return self._plain.encode_batch([str.__str__(item.text) for item in batch], add_special_tokens=False)

    def finish(self, batch: Sequence[Rendered], encodings: Sequence[Encoding]) -> list[Encoded | RowError]:
        """Ids and masks from the tokenizer's encodings of a batch; for a row that isn't safe its error."""
        rows = [encoding.ids for encoding in encodings]
        flat = np.fromiter(itertools.chain.from_iterable(rows), np.int32)
        starts = np.concatenate([[0], np.cumsum(list(map(len, rows)))])
        specials = np.diff(np.concatenate([[0], np.cumsum(self._is_special[flat])])[starts]).tolist()
        results: list[Encoded | RowError] = []
        for at, (item, encoding) in enumerate(zip(batch, encodings, strict=True)):
            try:
                results.append(self._finish(item, encoding, flat[starts[at] : starts[at + 1]], specials[at]))
            except RowError as error:
                results.append(error)
        return results

    def _finish(self, item: Rendered, encoding: Encoding, ids: np.ndarray, specials: int) -> Encoded:
        """Ids and mask of one row whose encoding has `specials` special tokens.

        Raises:
            RowError: text in a message can't be kept apart from the template's special tokens.
        """
        renderer = self._renderer
        spans, shift = item.spans, None
        if not renderer.template.parse_content:
            written = renderer.count_special_outside(item.text)
            if item.guarded or specials != written:
                encoding, ids, shift = self._encode_guarded(item)
                if self._is_special[ids].sum() != written:
                    raise RowError(
                        "text in a message is read as a special token even when kept apart from the template",
                        "special-token text that can't be kept apart",
                    )
        mask = np.zeros(len(ids), dtype=np.uint8)
        if spans is None:
            mask[:] = 1
            return Encoded(ids, mask)
        ends = None
        for start, end in spans:
            if shift is not None:
                start, end = shift(start), shift(end)
            if start == end:
                continue
            first, last = encoding.char_to_token(start), encoding.char_to_token(end - 1)
            if first is None or last is None or encoding.token_to_chars(last)[1] != end:
                if ends is None:
                    ends = np.array([stop for _, stop in encoding.offsets])
                first, stop = np.searchsorted(ends, (start, end), side="right")
            else:
                stop = last + 1
                while stop < len(ids) and encoding.token_to_chars(stop) == encoding.token_to_chars(last):
                    stop += 1  # one character in several byte tokens
            mask[first:stop] = 1
        return Encoded(ids, mask)

    def _encode_guarded(self, item: Rendered):
        """Encode with the template's special tokens alone read as such.

        Returns:
            the encoding, its ids, and the map of positions in `item.text` to positions in the encoded text.
        """
        renderer = self._renderer
        renderer.check_no_injection(item.conversation, item.text, item.prompted)
        core, names, back = self._guarding or self._guard()
        pieces, starts, growth, at, grown = [], [0], [0], 0, 0
        for token in renderer.special_outside(item.text):
            name = names[token.group()]
            pieces += [str.__getitem__(item.text, slice(at, token.start())), name]
            at = token.end()
            grown += len(name) - len(token.group())
            starts.append(at)
            growth.append(grown)
        pieces.append(str.__getitem__(item.text, slice(at, None)))
        with failures(self._name, FAILS):
            encoding = core.encode("".join(pieces), add_special_tokens=False)
        ids = back[np.array(encoding.ids, dtype=np.int64)].astype(np.int32)

        def shift(position: int) -> int:
            return position + growth[int(np.searchsorted(starts, position, side="right")) - 1]

        return encoding, ids, shift

    def _guard(self):
        """A copy of the tokenizer to which special tokens are known under names that no message contains."""
        spec = json.loads(self._own.to_str())
        known = {token["id"]: token["content"] for token in spec["added_tokens"]}
        names, drawn = {}, secrets.token_hex(8)  # drawn, so that no data can be made to hold a name
        for token in spec["added_tokens"]:
            if self._is_special[token["id"]]:
                names[token["content"]] = f"\U0010fff0{drawn}-{token['id']}\U0010fff1"
                token["content"] = names[token["content"]]
        spec["post_processor"] = None
        core = _core(json.dumps(spec))
        back = np.arange(core.get_vocab_size(with_added_tokens=True) + len(known))
        for index, content in known.items():
            back[core.token_to_id(names.get(content, content))] = index
        self._guarding = core, names, back
        return self._guarding


def _core(spec: str) -> Tokenizer:
    """A tokenizer core that neither cuts nor pads and whose offsets cover every character."""
    core = Tokenizer.from_str(spec)
    core.no_truncation()
    core.no_padding()
    core.post_processor = None  # it adds special tokens, which the template does, and trims offsets
    return core
