"""Show what a run would be trained on: `python -m posttrain.preview` with the words of the training command.

    python -m posttrain.preview model=llama3_8b data=alpaca data.path=my.json template=llama3 preview.limit=5
    python -m posttrain.preview model=hf model.path=DIR_WITH_A_TOKENIZER data=messages data.path=chats.jsonl

Prints conversations with the trained tokens marked, and the statistics of the data as it would be packed; writes them
as JSON Lines (`preview.out`) and as a page (`preview.html`). Neither Megatron nor torch is loaded.
"""

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from posttrain import check, compose, schema, stop, targets
from posttrain.errors import UserError


@dataclass
class PreviewSchema:
    """conf/preview.yaml."""

    limit: int = 3
    out: str | None = None
    html: str | None = None


@dataclass
class PreviewConfig(schema.Config):
    """The configuration of a run, and how to show its data."""

    preview: PreviewSchema = field(default_factory=PreviewSchema)


ConfigStore.instance().store(name="schema_preview", node=PreviewConfig)


@stop.command
def main() -> None:
    """Entry point; exits with 2 after a mistake of the user's."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__.strip())
        return
    compose.run(run, config_name="preview")


def run(cfg: DictConfig) -> None:
    """Show the data of a composed configuration.

    Raises:
        UserError: as training would for the same words.
    """
    targets.check(cfg)
    check.ranges(cfg)
    options = cfg.preview
    if options.limit < 0:
        raise UserError(f"`preview.limit={options.limit}`: must be 0 (all) or more")
    for key in ("out", "html"):
        if options[key] is not None and not Path(options[key]).expanduser().absolute().parent.is_dir():
            raise UserError(f"`preview.{key}={options[key]}`: there is no such folder")
    for key in ("model.path", "data.path", "data.sources"):
        if OmegaConf.is_missing(cfg, key):
            raise UserError(f"`{key}`: has no value; give it on the command line")

    from posttrain.cache import cache_root
    from posttrain.data import show
    from posttrain.data.check import check as check_data

    data, template = check_data(cfg)
    tokenizer = load_tokenizer(cfg)
    cache_dir = cache_root(cfg.cache_dir)
    built = data.build(
        tokenizer=tokenizer, template=template, seq_length=cfg.trainer.seq_length, seed=cfg.seed, cache_dir=cache_dir
    )
    report = built.report
    steps = -(-len(built.train) // cfg.trainer.global_batch_size)
    report["steps_per_epoch"] = steps

    shown = data.samples(tokenizer=tokenizer, template=template, seq_length=cfg.trainer.seq_length, cache_dir=cache_dir)
    shown = islice(shown, options.limit or None)
    out = Path(options.out).expanduser() if options.out else None
    keep = options.limit > 0
    chats = []
    for chat in _written(shown, out):
        if keep or options.html or not out:
            chats.append(show.chat(chat, tokenizer))
    title = f"{template.name} template, {cfg.data.path or 'several sources'}"
    if options.html:
        Path(options.html).expanduser().write_text(show.page(title, chats, report), encoding="utf-8")
    show.terminal(chats, report)
    for path in filter(None, (out, options.html)):
        print(f"written: {path}")


def load_tokenizer(cfg: DictConfig) -> Any:
    """The model's tokenizer. Kept from importing torch, which takes longer than all the rest."""
    from posttrain.data.check import built

    model = built(cfg.model)
    if model.path is None and model.tokenizer is None:
        raise UserError("`model.path`: give a folder with a tokenizer, or a hub id")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # one says that torch is missing
    _ = model.tokenizer_path  # the demo model is converted here, with torch
    hidden = "torch" not in sys.modules
    if hidden:
        sys.modules["torch"] = None  # to transformers it is not installed
    try:
        return model.load_tokenizer()
    finally:
        if hidden:
            del sys.modules["torch"]


def _written(samples: Iterator[Any], out: Path | None) -> Iterator[Any]:
    """Pass the samples on, writing each to `out`."""
    if out is None:
        yield from samples
        return
    with out.open("w", encoding="utf-8") as file:
        for sample in samples:
            row = {
                "row": sample.place.row,
                "file": sample.place.file,
                "text": str.__str__(sample.rendered.text),
                "input_ids": sample.encoded.input_ids.tolist(),
                "loss_mask": sample.encoded.mask.tolist(),
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            yield sample


if __name__ == "__main__":
    main()
