"""Sizes for a run of one's own data on a CPU, where nothing chooses them: overrides of the command line.

The defaults suit a GPU: a step of 32 sequences of 4,096 tokens takes a CPU minutes, and most of it would be padding
where conversations are few and short. So a step gets about as many tokens as the demo's, in sequences that the longest
conversation fits. They are overrides, so the configuration of a run, a run again and a resumed one have them exactly.
"""

import contextlib
import os
import sys
from collections.abc import Collection, Iterable, Sequence
from itertools import islice

from hydra._internal.utils import get_args_parser
from omegaconf import DictConfig, OmegaConf

from posttrain.cli.precheck import split_overrides, trials
from posttrain.config import yaml_file
from posttrain.config.composition import CONF_DIR, compose
from posttrain.config.instantiate import built
from posttrain.data.checks import check as check_data
from posttrain.data.training_data import TrainingData
from posttrain.errors import UserError
from posttrain.models.tokenizer import load_tokenizer
from posttrain.spec import checks, first_rows
from posttrain.spec.resolve import AUTO
from posttrain.utils import working
from posttrain.utils.cache import cache_root
from posttrain.utils.gpus import visible_gpus

LENGTH, BATCH = "trainer.seq_length", "trainer.global_batch_size"
STEP_TOKENS = 2_048  # of the demo's steps: seconds on two cores
LEAST, STEP = 256, 64  # tokens of a sequence: the demo's, and what others are rounded up to
ROOMY = 1_024  # up to here a sequence holds two of the longest conversations, so that little is padding
WINDOW = 512  # tokens of a window of plain text, which may be cut anywhere
READ = 1_000  # samples that are looked at; longer ones behind them are truncated, which the run says
GROUPS = ("model", "data", "template", "objective")
# What chooses sizes as a whole, or a machine that is not this one.
CHOSEN = ("experiment", "recipe", "recipe.name", "trainer", "launch.submit", "launch.nnodes", "hydra/launcher")


def complete(arguments: Sequence[str], config_name: str) -> list[str]:
    """The arguments of a command with the sizes that a training leaves to this machine, which are said.

    Args:
        arguments: of a checked command line.
        config_name: what the command composes.
    """
    args = get_args_parser().parse_args(list(arguments))
    if args.help or args.hydra_help or args.cfg or args.info or args.config_name:
        return list(arguments)
    overrides, extra = split_overrides(args)
    keys = keys_of(overrides)
    if not are_left(keys):
        return list(arguments)
    points = trials(overrides) if args.multirun else [overrides]
    added = choose((compose([*point, *extra], config_name) for point in points), keys)
    if added:
        print(
            f"posttrain: on a CPU: {' '.join(added)}: the longest sample fits, and a step is short; as on a GPU: "
            f"{LENGTH}={default(LENGTH)} {BATCH}={default(BATCH)}",
            file=sys.stderr,
            flush=True,
        )
    return [*arguments, *added]


def keys_of(overrides: Sequence[str]) -> set[str]:
    """The keys and groups that overrides set."""
    return {override.lstrip("+~").partition("=")[0] for override in overrides}


def are_left(keys: Collection[str]) -> bool:
    """Whether a run that sets these keys leaves its sizes to this machine: it has no GPU, the data are one's own."""
    if visible_gpus() or "TORCHELASTIC_RUN_ID" in os.environ:
        return False
    return not {*CHOSEN, LENGTH} & set(keys) and bool({"data", "data.path", "data.sources"} & set(keys))


def choose(configurations: Iterable[DictConfig], keys: Collection[str]) -> list[str]:
    """The overrides that choose the sizes of a run, or of all trials of a sweep alike; none where something else does.

    Args:
        configurations: as composed without them.
        keys: that the command line sets.
    """
    lengths: dict[str, int] = {}  # by what they depend on; a sweep has one
    for cfg in configurations:
        if cfg.trainer.seq_length != default(LENGTH):
            return []
        key = "".join([OmegaConf.to_yaml(cfg[group]) for group in GROUPS])
        if key not in lengths:
            with contextlib.suppress(UserError):  # said by the run, or the one trial, that can't read its data
                lengths[key] = length_for(cfg)
    if not lengths:
        return []
    length = max(lengths.values())
    added = [f"{LENGTH}={length}"]
    if BATCH not in keys and cfg.trainer.global_batch_size == default(BATCH):
        at_once = checks.world_size(cfg, 0)
        if cfg.trainer.micro_batch_size != AUTO:  # which is 1 on a CPU
            at_once *= int(cfg.trainer.micro_batch_size)
        added.append(f"{BATCH}={-(-max(1, STEP_TOKENS // length) // at_once) * at_once}")
    return added


def default(key: str) -> int:
    """The value that conf/ gives a key of `trainer`."""
    own = yaml_file.read(CONF_DIR / "trainer" / "default.yaml")
    return int(own[key.rpartition(".")[2]])


def length_for(cfg: DictConfig) -> int:
    """Tokens of a packed sequence that a configuration's first samples fit; at most its trainer.seq_length.

    Raises:
        UserError: the tokenizer or the data can't be read.
    """
    working.phase("reading data")
    most: int = cfg.trainer.seq_length
    first_rows.look(cfg)  # before the tokenizer, which takes seconds to load
    data, template = check_data(cfg)
    if not isinstance(data, TrainingData):
        return most
    encoder = built(cfg.objective).encoder(data, template, load_tokenizer(cfg), most)
    if encoder.unit == "window":
        return min(most, WINDOW)
    longest = 0
    for sample in islice(data.samples(encoder, cache_root(cfg.cache_dir)), READ):
        longest = max(longest, len(sample.encoded.input_ids))
    wanted = max(LEAST, longest, min(2 * longest, ROOMY))
    return min(most, -(-wanted // STEP) * STEP)
