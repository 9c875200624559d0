"""Plain text: documents as formats read them, and the windows of tokens that are trained on."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from posttrain.data import fingerprint
from posttrain.data.conversation import Document, RowError
from posttrain.data.encode import FAILS, Encoded
from posttrain.data.prepare import BATCH, Counts, Sample, batches, pad_token, refusal, stops_run
from posttrain.data.readers import Place
from posttrain.errors import UserError
from posttrain.models.tokenizer_files import failures

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Windows:
    """How documents are cut.

    Attributes:
        length: most tokens of a window.
        overlap: tokens that a window repeats from the one before, as context without a loss.
        boundaries: whether a window ends with its document; else all documents are one stream.
        append_eos: whether a document ends with the end-of-sequence token.
    """

    length: int
    overlap: int = 0
    boundaries: bool = True
    append_eos: bool = True

    def cut(self, ids: np.ndarray) -> Iterator[Encoded]:
        """Cut a document, or a stream of them.

        Args:
            ids: int32[n].

        Yields:
            Windows of `length` tokens, the last one shorter: the first at 0, each further one `length - overlap`
            tokens on. Every token of the first is supervised, of the others those that are not repeated.
        """
        start = 0
        while start == 0 or start + self.overlap < len(ids):
            window = ids[start : start + self.length]
            mask = np.ones(len(window), np.uint8)
            if start:
                mask[: self.overlap] = 0
            yield Encoded(window, mask)
            start += self.length - self.overlap


class DocumentEncoder:
    """Documents as windows of tokens, all of them supervised; see `posttrain.data.prepare.RowEncoder`.

    Args:
        tokenizer: a Hugging Face fast tokenizer; what it adds to a text, such as a beginning token, is kept.
        windows: how documents are cut.
        on_error: "error" or "skip": what to do with a row that is no document.

    Raises:
        UserError: documents shall end with a token that the tokenizer lacks.
    """

    unit = "window"
    row_unit = "document"

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", windows: Windows, on_error: str) -> None:
        if windows.append_eos and tokenizer.eos_token_id is None:
            raise UserError(
                "objective.append_eos=true: the tokenizer has no end-of-sequence token; set objective.append_eos=false"
            )
        self.tokenizer = tokenizer
        self.windows = windows
        self.on_error = on_error
        self.pad_id = pad_token(tokenizer)

    @property
    def identity(self) -> dict[str, Any]:
        return {"windows": self.windows, "tokenizer": fingerprint.tokenizer(self.tokenizer), "on_error": self.on_error}

    def samples(self, rows: Iterable[tuple[Place, Document | RowError]], counts: Counts) -> Iterator[list[Sample]]:
        documents = self._tokens(batches(self._usable(rows, counts)))
        cut = self._documents(documents) if self.windows.boundaries else self._stream(documents)
        batch: list[Sample] = []
        for place, content, encoded in cut:
            if not encoded.mask[1:].any():  # the first token has nothing before it to be predicted from
                counts.drop("nothing to train on", place)
                continue
            counts.kept += 1
            batch.append(Sample(place, content, None, digest(encoded.input_ids), encoded))
            if len(batch) == BATCH:
                yield batch
                batch = []
        if batch:
            yield batch

    def _usable(
        self, rows: Iterable[tuple[Place, Document | RowError]], counts: Counts
    ) -> Iterator[tuple[Place, Document]]:
        """The rows that are documents with a text; the others are counted."""
        for place, document in rows:
            counts.rows += 1
            if isinstance(document, RowError):
                if stops_run(document, self.on_error):
                    raise refusal(place, document)
                counts.drop(document.kind, place, document.reason)
                continue
            counts.read += 1
            if document.text.strip():
                for name, value in document.unread.items():
                    counts.leave_unread(name, value, place)
                yield place, document
            else:
                counts.drop("an empty document", place)

    def _tokens(
        self, documents: Iterable[list[tuple[Place, Document]]]
    ) -> Iterator[tuple[Place, Document, np.ndarray]]:
        """The token ids int32[n] of each document."""
        eos = self.tokenizer.eos_token_id
        for batch in documents:
            texts = [document.text for _, document in batch]
            with failures(self.tokenizer.name_or_path, FAILS):
                encodings = self.tokenizer(texts, truncation=False, padding=False, verbose=False)
            for (place, document), ids in zip(batch, encodings.input_ids, strict=True):
                if self.windows.append_eos and ids[-1:] != [eos]:
                    ids.append(eos)
                yield place, document, np.array(ids, np.int32)

    def _documents(
        self, documents: Iterable[tuple[Place, Document, np.ndarray]]
    ) -> Iterator[tuple[Place, Document, Encoded]]:
        """The windows of each document by itself."""
        for place, document, ids in documents:
            for encoded in self.windows.cut(ids):
                yield place, document, encoded

    def _stream(
        self, documents: Iterable[tuple[Place, Document, np.ndarray]]
    ) -> Iterator[tuple[Place, Document, Encoded]]:
        """The windows of all documents one after another, by the document that a window begins in."""
        waiting: list[tuple[Place, Document, np.ndarray]] = []
        size = 0
        first = True
        for document in documents:
            waiting.append(document)
            size += len(document[2])
            while size > self.windows.length:  # not the last one, which may be all that is left
                yield self._window(waiting, first)
                first = False
                size = sum(len(ids) for _, _, ids in waiting)
        if size > (0 if first else self.windows.overlap):
            yield self._window(waiting, first)

    def _window(
        self, waiting: list[tuple[Place, Document, np.ndarray]], first: bool
    ) -> tuple[Place, Document, Encoded]:
        """Take the next window off the documents that wait, all but what the one after it repeats."""
        place, document, _ = waiting[0]
        parts = []
        room = self.windows.length
        for _, _, part in waiting:
            parts.append(part[:room])
            room -= len(parts[-1])
        ids = np.concatenate(parts)
        mask = np.ones(len(ids), np.uint8)
        if not first:
            mask[: self.windows.overlap] = 0
        taken = self.windows.length - self.windows.overlap
        while waiting and taken >= len(waiting[0][2]):
            taken -= len(waiting.pop(0)[2])
        if waiting:
            waiting[0] = (*waiting[0][:2], waiting[0][2][taken:])
        return place, document, Encoded(ids, mask)


def digest(ids: np.ndarray) -> int:
    """An int64 that is equal for equal windows."""
    return int.from_bytes(hashlib.blake2b(ids.tobytes(), digest_size=8).digest(), "little", signed=True)
