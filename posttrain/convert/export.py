"""Hugging Face directories out of a live Megatron model, published only if they are that model."""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from posttrain.convert import long_prompt, megatron_logits
from posttrain.convert.artifacts import add_stop_tokens, as_set, copy_generation_config, write_config
from posttrain.convert.card import write_card
from posttrain.convert.publish import publishing
from posttrain.convert.shards import ShardWriter
from posttrain.convert.trained_tokenizer import TrainedTokenizer
from posttrain.convert.verify import LiveLogits, compare_base, verify_export
from posttrain.errors import ExportRefused
from posttrain.models import HFModel
from posttrain.models.families import family_of
from posttrain.models.fully_sharded import put_shards_back, whole_trained
from posttrain.models.headers import read_headers, read_json
from posttrain.models.hf import DEMO
from posttrain.models.hf_adapter import CONFIG, PREFIX, WEIGHTS
from posttrain.models.vocabulary import is_output, is_vocabulary
from posttrain.peft.magnitudes import export_magnitudes
from posttrain.utils import working
from posttrain.utils.atomic_files import write_json

if TYPE_CHECKING:
    from megatron.bridge import AutoBridge
    from megatron.bridge.peft.base import PEFT

log = logging.getLogger(__name__)


@dataclass
class Source:
    """A live model and where it comes from.

    Attributes:
        model: the Hugging Face model before training.
        bridge: its megatron.bridge.AutoBridge.
        parts: the Megatron model's chunks of this process.
        peft: Megatron-Bridge's adapter object; None: the whole model is written.
        dtype: of the weights that are written, and of the arithmetic.
        device: "cpu" or "cuda".
        unchecked: why the logits can't be compared; None: they can.
        tokenizer: what it was trained with; None: the model's own, and no template is known.
        facts: about the training (posttrain.convert.training_metadata); None: there was none.
        license: of the weights, for the model card; None: what the facts say.
        base: what `check_base` found; None: it was not called.
    """

    model: HFModel
    bridge: "AutoBridge"
    parts: list[torch.nn.Module]
    peft: "PEFT | None"
    dtype: torch.dtype
    device: str
    unchecked: str | None = None
    tokenizer: TrainedTokenizer | None = None
    facts: dict[str, Any] | None = None
    license: str | None = None
    base: dict[str, Any] | None = None


def check_base(source: Source) -> dict[str, Any]:
    """Compare the live model before training with what transformers makes of the files given; a collective call.

    Returns:
        What was found, or why nothing was compared.

    Raises:
        ExportRefused: the logits differ by more than the tolerance; on every process.
    """
    model = source.model
    if source.unchecked or model.random_init:
        return {"checked": False, "reason": source.unchecked or "the weights are random"}
    trained = source.tokenizer or TrainedTokenizer(model)
    rows = model.file_rows  # new ones are not in the files
    live = compute_live(source, trained, rows)
    report: dict[str, Any] = {}
    reason = None
    if torch.distributed.get_rank() == 0:
        try:
            report = compare_base(model, live, source.device)
        except ExportRefused as error:
            reason = str(error)
    refuse_everywhere(reason)
    return report


def compute_live(
    source: Source, trained: TrainedTokenizer, rows: int, conversation: list[int] | None = None
) -> LiveLogits:
    """The live model's logits of short prompts, and of one that is longer than its windows; a collective call.

    Args:
        source: the live model.
        trained: its tokenizer.
        rows: of its embedding that are used.
        conversation: ids of a further short prompt.
    """
    prompts = [megatron_logits.encode_prompts(trained.tokenizer, rows, conversation)]
    long = long_prompt.plan(source.model.hf_config(), source.device)
    if long.length:
        prompts.append(long_prompt.encode(trained.tokenizer, rows, long.length))
    logits = [megatron_logits.compute_logits(source.parts, tokens)[..., :rows] for tokens in prompts]
    return LiveLogits(prompts, logits, source.dtype == torch.bfloat16, long.unseen)


def refuse_everywhere(reason: str | None) -> None:
    """Raise ExportRefused on every process with the reason that the first one gives, if it gives one."""
    refused = [reason]
    if torch.distributed.get_world_size() > 1:
        torch.distributed.broadcast_object_list(refused, src=0)
    if refused[0]:
        raise ExportRefused(refused[0])


def export_source(
    source: Source, out: Path, overwrite: bool = False, progress: Callable[[int], object] | None = None
) -> Path:
    """Write the directory `out` with verification.json in it; tokenizer included; a collective call.

    Args:
        source: the live model.
        out: the directory.
        overwrite: replace a directory that is there.
        progress: called with the bytes of each tensor written.

    Raises:
        ExportRefused: it is not the model that was trained; on every process.
    """
    working.phase("exporting")
    rank = torch.distributed.get_rank()
    trained = source.tokenizer or TrainedTokenizer(source.model)
    live: LiveLogits | str = source.unchecked or ""
    if not live:
        rows = source.model.hf_config().vocab_size
        live = compute_live(source, trained, rows, trained.conversation)
    reason = None
    try:
        with publishing(out, overwrite, first=rank == 0) as scratch:
            if source.peft:
                write_adapter(source, scratch)
            else:
                write_weights(source, scratch, progress)
            if rank == 0:
                write_artifacts(source, trained, scratch)
                dtype = str(source.dtype).removeprefix("torch.")
                report = {"tokenizer": trained.check(scratch)}
                working.phase("verifying")
                report |= verify_export(scratch, source.model, dtype, live, source.device)
                if source.base:
                    report["base"] = source.base
                write_json(scratch / "verification.json", report)
                write_card(scratch, name_of(out), source.facts, source.license)
                log.info("export verified: %s", json.dumps(report))
    except ExportRefused as error:
        reason = str(error)
    refuse_everywhere(reason)
    return out


def name_of(out: Path) -> str:
    """What to call an export: a run's after the run."""
    return out.parent.name if out.name in ("adapter", "hf") else out.name


def write_weights(source: Source, scratch: Path, progress: Callable[[int], object] | None = None) -> None:
    """All weights as safetensors, adapters merged; written by the first process, the others send their parts."""
    config = source.model.hf_config()
    # Without a base to compare with the bridge writes a tied matrix twice.
    tied = source.model.random_init and getattr(config, "tie_word_embeddings", False)
    put_shards_back(source.parts)
    writer = ShardWriter(scratch) if torch.distributed.get_rank() == 0 else None
    for name, tensor in source.bridge.export_hf_weights(source.parts, cpu=True, show_progress=False):
        if writer and not (tied and is_output(name)):
            if is_vocabulary(name):
                tensor = tensor[: config.vocab_size]  # tensor parallelism may have padded it
            writer.add(name, tensor.to(source.dtype))
            if progress:
                progress(tensor.numel() * source.dtype.itemsize)
    if writer:
        writer.close()


def write_adapter(source: Source, scratch: Path) -> None:
    """adapter_config.json and adapter_model.safetensors as PEFT writes them."""
    model = source.model
    base = model.base
    if not model.random_init and (Path(base).is_dir() or base.startswith(DEMO)):
        base = str(model.directory.resolve())
    with whole_trained(source.parts, source.dtype):
        source.bridge.save_hf_adapter(
            source.parts, scratch, source.peft, base_model_name_or_path=base, show_progress=False
        )
        added = export_magnitudes(source.bridge, source.parts)
    if torch.distributed.get_rank() != 0:
        return
    family = family_of(model.hf_config().to_dict())
    if family is not None and family.transposed:
        config = read_json(scratch / CONFIG)
        write_json(scratch / CONFIG, config | {"fan_in_fan_out": True})
    if model.rows is not None and not model.random_init:
        added |= grown_vocabulary(model)
    if added:
        save_file(load_file(scratch / WEIGHTS) | added, scratch / WEIGHTS, metadata={"format": "pt"})


def grown_vocabulary(model: HFModel) -> dict[str, torch.Tensor]:
    """The embedding and output matrix of a model that has more rows than its base, by their names in a PEFT file."""
    matrices = {}
    for name, tensor in read_headers(model.directory).items():
        if is_vocabulary(name):
            with safe_open(tensor.file, framework="pt") as file:
                matrices[PREFIX + name] = model.vocabulary(name, file.get_tensor(name)).contiguous()
    return matrices


def write_artifacts(source: Source, trained: TrainedTokenizer, scratch: Path) -> None:
    """The tokenizer, generation_config.json with every token that ends an answer, config.json of a whole model."""
    model = source.model
    base: Path | None = None
    if not model.random_init:
        base = model.directory
    elif model.architecture is None and Path(model.path).is_dir():
        base = Path(model.path)
    if not source.peft:
        write_config(scratch, model.hf_config(), base, str(source.dtype).removeprefix("torch."))
    trained.write(scratch)
    if base:
        copy_generation_config(scratch, base)
    known = model.hf_config().eos_token_id
    if not source.peft:
        add_stop_tokens(scratch, trained.stops, known)
    elif trained.stops:  # no config.json beside it says where the base ends
        add_stop_tokens(scratch, trained.stops | as_set(known, scratch / "config.json"), None)
