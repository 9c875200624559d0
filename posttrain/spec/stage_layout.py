"""Megatron-Core's notation for the layers of each pipeline stage, `Et*17|t*15L`, read without Megatron.

Its reader (megatron/core/transformer/pipeline_parallel_layer_layout.py) imports torch, and is asked when all else of a
run is built.
"""

import re
from collections.abc import Sequence

from posttrain.errors import UserError
from posttrain.utils.escape import shorten

EMBEDDING, LAYER, PREDICTION, LOSS = "E", "t", "m", "L"
NAMES = {"embedding": EMBEDDING, "decoder": LAYER, "mtp": PREDICTION, "loss": LOSS}  # in a layout that is a list
TERM = re.compile(r"(?:([EtmL|])|\(([^()]+)\)(?=\*))(?:\*(\d{1,5}))?")
COUNTED = {LAYER: "layers", PREDICTION: "layers of multi-token prediction"}
MOST = 100_000  # letters of a layout that is written out
NOTATION = "stages are separated by | and made of E (embedding), t (a layer) and L (loss); t*3 is ttt, (tt|)*2 tt|tt|"


def check_layout(
    key: str, layout: object, layers: int, stages: int, virtual: int | None = None, predictions: int = 0
) -> list[int]:
    """Check that a layout is of this model and of so many stages.

    Args:
        key: of the layout, for errors.
        layout: its text, or a list of stages, each a list of names.
        layers: transformer layers of the model.
        stages: `parallelism.pipeline_model_parallel_size`.
        virtual: virtual stages of each, where that is asked for; None: as the layout has it.
        predictions: layers of multi-token prediction.

    Returns:
        Layers of each part of it: of a pipeline stage, or of a virtual one.

    Raises:
        UserError: it can't be read, or contradicts one of these.
    """
    where = f"`{key}={shorten(str(layout), 100)}`"
    try:
        parts = read_layout(layout)
    except ValueError as error:
        raise UserError(f"{where}: {error}; {NOTATION}") from None
    size = f"parallelism.pipeline_model_parallel_size={stages}"
    if virtual is not None and len(parts) != stages * virtual:
        raise UserError(
            f"{where}: its stages are {len(parts)}; {size} and virtual_pipeline_model_parallel_size={virtual} make "
            f"{stages * virtual}; change one of them"
        )
    if len(parts) % stages:
        raise UserError(f"{where}: its stages are {len(parts)}, no multiple of {size}; change one of them")
    whole = "".join(parts)
    ends = whole[:1] == EMBEDDING and whole[-1:] == LOSS
    if not ends or whole.count(EMBEDDING) > 1 or whole.count(LOSS) > 1:
        raise UserError(f"{where}: must have one E, at its very beginning, and one L, at its very end")
    counts = {LAYER: layers, PREDICTION: predictions}
    for letter, count in counts.items():
        if whole.count(letter) != count:
            raise UserError(f"{where}: {COUNTED[letter]} ({letter}): {whole.count(letter)} there, {count} in the model")
    return [part.count(LAYER) for part in parts]


def read_layout(layout: object) -> list[str]:
    """The letters of each stage, `["Ett", "tL"]`, written out.

    Args:
        layout: a text, or a list of stages, each a list of names.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(layout, str):
        return _written_out(layout.replace(",", "")).split("|")
    if not isinstance(layout, Sequence):
        raise ValueError("is neither a text nor a list of stages")
    parts = []
    for stage in layout:
        if isinstance(stage, str) or not isinstance(stage, Sequence):
            raise ValueError(f"{stage}: is no stage, which is a list of names")
        letters = ""
        for name in stage:
            letter = NAMES.get(str(name).strip().lower())
            if letter is None:
                raise ValueError(f"{name}: is none of {', '.join(NAMES)}")
            letters += letter
        parts.append(letters)
    return parts


def _written_out(text: str) -> str:
    """A layout, or what is between its parentheses, without repeats."""
    written = ""
    position = 0
    while position < len(text):
        term = TERM.match(text, position)
        if term is None:
            raise ValueError(f"can't be read from {shorten(text[position:], 20)!r} on")
        letter, group, times = term.groups()
        repeated = letter or _written_out(group)
        count = 1
        if times is not None:
            count = int(times)
        if len(written) + len(repeated) * count > MOST:
            raise ValueError(f"has more than {MOST:,} layers and stages")
        written += repeated * count
        position = term.end()
    return written
