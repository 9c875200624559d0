"""What the data and the tokenizer refuse, said before any process starts: the first rows are read and rendered.

Rows are read as training reads them, and rendered with an outline of the tokenizer, since transformers takes seconds
to import; what that refuses is refused only if the tokenizer itself does so too.
"""

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from posttrain.config.instantiate import built
from posttrain.data.conversation import Conversation, RowError
from posttrain.data.readers import Place
from posttrain.data.templates import ChatTemplate
from posttrain.data.training_data import TrainingData
from posttrain.errors import UserError
from posttrain.models.tokenizer import load_tokenizer
from posttrain.models.tokenizer_outline import TokenizerOutline
from posttrain.utils.cache import cache_root
from posttrain.utils.user_paths import expand_home

FIRST = 64  # rows of each path
ELSEWHERE = ("demo:", "hf://")  # data that is made, or fetched, when the run has begun
GROUPS = ("model", "data", "template", "objective")
type Rows = Sequence[tuple[Place, Any]]  # what a format reads, or why it can't
_accepted: set[str] = set()  # of a sweep's trials, most of which have the same data


def look(cfg: DictConfig) -> None:
    """Read and render the first rows of a checked configuration.

    Raises:
        UserError: as training would, for a row, the template, or the tokenizer.
    """
    data, template = built(cfg.data), built(cfg.template)
    if not isinstance(data, TrainingData) or not isinstance(template, ChatTemplate):
        return  # of the user's own class
    key = "".join([OmegaConf.to_yaml(cfg[group]) for group in GROUPS])
    if key in _accepted:
        return
    rows = _first(data, cache_root(cfg.cache_dir))
    directory = expand_home(cfg.model.tokenizer or cfg.model.path)
    if not _renders(data, template, rows, directory):
        from posttrain.data.prepare import Counts

        encoder = built(cfg.objective).encoder(data, template, load_tokenizer(cfg), cfg.trainer.seq_length)
        for _ in encoder.samples(rows, Counts()):
            pass
    _accepted.add(key)


def _first(data: TrainingData, cache: Path) -> Rows:
    """The first rows of each path on this machine.

    Raises:
        UserError: one can't be used, and that is not to be skipped; or a file can't be read.
    """
    from posttrain.data import prepare, sources

    first: list[tuple[Place, Any]] = []
    for source in data.all_sources():
        if not str(source.path).startswith(ELSEWHERE):
            first += islice(sources.rows(source, cache), FIRST)
    for place, row in first:
        if isinstance(row, RowError) and prepare.stops_run(row, data.on_error):
            raise prepare.refusal(place, row)
    return first


def _renders(data: TrainingData, template: ChatTemplate, rows: Rows, directory: Path) -> bool:
    """Whether an outline of the tokenizer in `directory` accepts the rows; True where nothing can be said."""
    from posttrain.data import prepare, render

    chats = [row for _, row in rows if isinstance(row, Conversation)]
    if not chats or not (directory / "tokenizer.json").is_file():
        return True
    try:
        renderer = render.Renderer(template, TokenizerOutline(directory))
        for chat in chats:
            prepare.render(chat, renderer, data.train_on)
    except UserError:
        return False
    except RowError:
        return data.on_error != "error"
    return True
