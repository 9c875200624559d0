"""Show what a run would train on: `python -m posttrain.preview`, with training's overrides.

    python -m posttrain.preview model=llama3_8b data=alpaca data.path=my.json template=llama3
    python -m posttrain.preview model=hf model.path=DIR_WITH_A_TOKENIZER data=messages \\
        data.path=chats.jsonl preview.limit=5

Prints conversations with the supervised tokens marked, and the statistics of the data as it would be
packed; writes them as JSON Lines (`preview.out`) and as a page (`preview.html`). Loads neither
Megatron nor torch.
"""

import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from posttrain.cli import command
from posttrain.config import schema, targets
from posttrain.config.instantiate import built
from posttrain.data.checks import check as check_data
from posttrain.errors import UserError
from posttrain.models.tokenizer import load_tokenizer
from posttrain.spec import checks, first_rows
from posttrain.spec.epochs import Epoch
from posttrain.spec.parallel_sizes import ParallelSizes, model_parallel_sizes
from posttrain.utils import stop, working
from posttrain.utils.cache import cache_root
from posttrain.utils.output_paths import check_file
from posttrain.utils.user_paths import expand_home

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from posttrain.data.prepare import RowEncoder, Sample
    from posttrain.data.training_data import TrainingData


@dataclass
class PreviewSchema:
    """conf/preview.yaml."""

    limit: int = schema.ranged(3, ge=0, le=10**9)
    out: str | None = None
    html: str | None = None


@dataclass
class PreviewConfig(schema.Config):
    """The configuration of a run, and how to show its data."""

    preview: PreviewSchema = field(default_factory=PreviewSchema)


ConfigStore.instance().store(name="schema_preview", node=PreviewConfig)


@stop.command
def main() -> None:
    """Entry point; exits with 2 after a user's mistake."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        command.show_help(__doc__, "preview")
        return
    command.run(show_data, config_name="preview", sized=True)


def show_data(cfg: DictConfig) -> None:
    """Show the data of a composed configuration.

    Raises:
        UserError: as training would for the same overrides.
    """
    check_options(cfg)
    data, template = check_data(cfg)
    checks.check_objective(cfg, data)
    first_rows.look(cfg)
    by_name = model_parallel_sizes(cfg)
    sizes = ParallelSizes(world=math.prod(by_name.values()), **by_name)
    checks.check_sequences(cfg.trainer.seq_length, sizes)

    working.phase("importing")
    from posttrain.data import preview_text

    working.phase("reading the tokenizer")
    tokenizer = load_tokenizer(cfg)
    encoder = built(cfg.objective).encoder(data, template, tokenizer, cfg.trainer.seq_length)
    working.phase("reading data")
    splits = data.build(
        encoder=encoder,
        seq_length=cfg.trainer.seq_length,
        seed=cfg.seed,
        cache_dir=cache_root(cfg.cache_dir),
        length_multiple=sizes.conversation_multiple,
    )
    report = splits.report
    epoch = Epoch(len(splits.train), cfg.trainer.global_batch_size)
    report["epoch"] = epoch.describe()
    report["seq_length"] = cfg.trainer.seq_length

    options = cfg.preview
    out = expand_home(options.out) if options.out else None
    page = expand_home(options.html) if options.html else None
    chats = []
    for sample in _samples(cfg, data, encoder, tokenizer, out, splits.names()):
        # All samples (limit 0) may be more than fit in memory: not kept where they are only
        # written.
        if options.limit > 0 or page or not out:
            chats.append(preview_text.to_chat(sample, tokenizer))
    if page:
        title = str(cfg.data.path or "several sources")
        page.write_text(preview_text.render_page(title, chats, report), encoding="utf-8")
    preview_text.print_chats(chats, report)
    if out:
        print(f"written: {out}")
    if page:
        print(f"written: {options.html}")


def check_options(cfg: DictConfig) -> None:
    """Check what can be checked without reading the data.

    Raises:
        UserError: an option is wrong or missing.
    """
    targets.check(cfg)
    checks.check_ranges(cfg, PreviewConfig)
    options = cfg.preview
    for key in ("out", "html"):
        path = options[key]
        if path is not None:
            check_file(expand_home(path), f"preview.{key}")
    for key in ("model.path", "data.path", "data.sources"):
        if OmegaConf.is_missing(cfg, key):
            raise UserError(f"`{key}`: has no value; give it on the command line")


def _samples(
    cfg: DictConfig,
    data: "TrainingData",
    encoder: "RowEncoder",
    tokenizer: "PreTrainedTokenizerBase",
    out: Path | None,
    split_names: list[str],
) -> "Iterator[Sample]":
    """Yield the first `preview.limit` samples that are in a split, each once it is written to `out`."""
    read = zip(split_names, data.samples(encoder, cache_root(cfg.cache_dir)), strict=False)
    samples = islice((one for one in read if one[0]), cfg.preview.limit or None)
    if out is None:
        yield from (sample for _, sample in samples)
        return
    with out.open("w", encoding="utf-8") as file:
        for split, sample in samples:
            row = {
                "row": sample.place.row,
                "file": sample.place.file,
                "split": split,
                "text": sample.text if sample.text is not None else tokenizer.decode(sample.encoded.input_ids),
                "input_ids": sample.encoded.input_ids.tolist(),
                "loss_mask": sample.encoded.mask.tolist(),
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            yield sample


if __name__ == "__main__":
    main()
