"""Check that a Hugging Face directory is the model that was trained: tensors by name and shape, logits by number."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from posttrain.convert.hf_logits import reference_logits, too_large
from posttrain.errors import ExportRefused, UserError
from posttrain.models import HFModel
from posttrain.models.families import family_of, possible_families
from posttrain.models.headers import read_headers, read_json
from posttrain.models.hf_adapter import check_against, is_adapter, read_adapter
from posttrain.models.shapes import check_directory
from posttrain.models.vocabulary import is_vocabulary

TOLERANCE = 1e-4  # fp32: largest difference over the largest logit
# bf16: root mean square of the difference to fp32 arithmetic, over that of transformers' own bf16 (and the rounding of
# one bf16 number where that is less): two implementations round differently, not more.
NOISES = 2.0
BF16_ROUNDING = 2.0**-8
STORED = {"float32": "F32", "bfloat16": "BF16"}  # in safetensors' words


@dataclass
class LiveLogits:
    """What the live model computes.

    Attributes:
        tokens: prompts, each int64[n, length].
        logits: of them, each float32[n, length, vocabulary, perhaps padded].
        bf16: its arithmetic.
        unseen: spans that no prompt is longer than, by name, tokens.
    """

    tokens: list[torch.Tensor]
    logits: list[torch.Tensor]
    bf16: bool
    unseen: dict[str, int] = field(default_factory=dict)


def verify_export(directory: Path, model: HFModel, dtype: str, live: LiveLogits | str, device: str) -> dict[str, Any]:
    """Compare what was written with the base, and with the live model through transformers (and PEFT).

    Args:
        directory: a Hugging Face model, or a PEFT adapter.
        model: the HFModel that it comes from.
        dtype: of the weights: float32, bfloat16.
        live: the live model's logits, or why there are none.
        device: "cpu" or "cuda", where transformers computes.

    Returns:
        What was checked and found.

    Raises:
        ExportRefused: a tensor or the logits differ by more than the tolerance; with the numbers.
    """
    adapter = is_adapter(directory)
    tensors = adapter_tensors(directory, model) if adapter else model_tensors(directory, model, dtype)
    if adapter and model.random_init:
        live = "the base weights are random and were not saved"
    if not isinstance(live, str):
        live = too_large(model, directory, device) or live
    if isinstance(live, str):
        return {"tensors": tensors, "logits": {"checked": False, "reason": live}}
    exact, rounded = reference_logits(directory, model, adapter, live.tokens, live.bf16, device)
    logits = compare(live, exact, rounded)
    if not logits["difference"] <= logits["tolerance"]:  # NaN as well
        if is_ruined(live, exact[0].size(-1)):
            raise ExportRefused(
                "export refused: the trained model's logits are not numbers, or all the same: its training has "
                "diverged; nothing was written. Train it with a smaller optimizer.lr, or trainer.export=best for "
                "weights before that"
            )
        raise ExportRefused(
            f"export refused: the logits differ by {logits['difference']:.3g} from the trained model's "
            f"({logits['measure']}), more than the tolerance of {logits['tolerance']:.3g}; nothing was written"
        )
    return {"tensors": tensors, "logits": logits}


def compare_base(model: HFModel, live: LiveLogits, device: str) -> dict[str, Any]:
    """Compare the live model before training with what transformers, and PEFT, make of its directories.

    Raises:
        ExportRefused: the logits differ by more than the tolerance.
    """
    reason = too_large(model, model.directory, device)
    if reason:
        return {"checked": False, "reason": reason}
    directory = model.adapter or model.directory
    exact, rounded = reference_logits(directory, model, bool(model.adapter), live.tokens, live.bf16, device)
    report = compare(live, exact, rounded)
    if not report["difference"] <= report["tolerance"]:  # NaN as well
        raise ExportRefused(
            f"{model.directory}: the logits of the model as it was loaded differ by {report['difference']:.3g} from "
            f"those of transformers ({report['measure']}), more than the tolerance of {report['tolerance']:.3g}; it is "
            "not trained (trainer.verify_base=false trains it nevertheless)"
        )
    return report


def model_tensors(directory: Path, model: HFModel, dtype: str) -> dict[str, Any]:
    """Names, shapes and dtype against the base's."""
    try:
        written = check_directory(directory)
    except UserError as error:
        raise ExportRefused(f"export refused: {error}") from error
    for name, tensor in sorted(written.items()):
        if tensor.dtype != STORED[dtype]:
            raise ExportRefused(f"export refused: {name} is {tensor.dtype}, not {dtype}")
    report: dict[str, Any] = {"count": len(written), "dtype": dtype, "against": "config.json"}
    config = read_json(directory / "config.json")
    if family_of(config) is None:
        report["against"] = "themselves: the model type is not known"
    if not model.random_init:
        check_same({name: tensor.shape for name, tensor in written.items()}, _expected_shapes(model, config))
        report["against"] = "the base's tensors"
    return report


def _expected_shapes(model: HFModel, config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The base's tensors but for buffers, with the rows that the model has grown to."""
    families = possible_families(config)
    shapes = {}
    for name, tensor in read_headers(model.directory).items():
        if any(family.is_buffer(name) for family in families):
            continue
        shapes[name] = tensor.shape
        if model.rows is not None and is_vocabulary(name):
            shapes[name] = (model.rows, *tensor.shape[1:])
    return shapes


def adapter_tensors(directory: Path, model: HFModel) -> dict[str, Any]:
    """Every tensor belongs to a matrix of the base and has its shape."""
    try:
        _, pairs, written = read_adapter(directory)
        if not model.random_init:
            check_against(read_headers(model.directory), pairs, written)
    except UserError as error:
        raise ExportRefused(f"export refused: {error}") from error
    against = "their own pairs" if model.random_init else "the base's matrices"
    return {"count": len(written), "dtype": sorted({t.dtype for t in written.values()}), "against": against}


def check_same(written: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]]) -> None:
    """Raise ExportRefused unless names and shapes are the same."""
    missing = sorted(expected.keys() - written.keys())
    extra = sorted(written.keys() - expected.keys())
    if missing or extra:
        raise ExportRefused(
            f"export refused: {len(missing)} tensors are missing{_first(missing)}, "
            f"{len(extra)} are too many{_first(extra)}; nothing was written"
        )
    for name, shape in expected.items():
        if tuple(written[name]) != tuple(shape):
            raise ExportRefused(f"export refused: {name} has shape {list(written[name])}, not {list(shape)}")


def _first(names: list[str]) -> str:
    return f" ({names[0]})" if names else ""


def compare(
    live: LiveLogits, exact_logits: list[torch.Tensor], rounded_logits: list[torch.Tensor] | None = None
) -> dict[str, Any]:
    """Difference of the logits and its tolerance, both relative to the logits' size.

    Args:
        live: the live model's.
        exact_logits: of the same prompts, in fp32 arithmetic.
        rounded_logits: in bf16 arithmetic.
    """
    # Tensor parallelism may have padded the vocabulary, or new tokens be left out.
    rows = min(live.logits[0].size(-1), exact_logits[0].size(-1))
    ours, exact = joined(live.logits, rows), joined(exact_logits, rows)
    report: dict[str, Any] = {
        "checked": True,
        "tokens": len(ours),
        "longest_prompt": max(tokens.size(-1) for tokens in live.tokens),
    }
    if live.unseen:
        report["not_seen"] = live.unseen
    if rounded_logits is None:
        difference = ((ours - exact).abs().max() / exact.abs().max()).item()
        return report | {
            "arithmetic": "float32",
            "measure": "largest difference over largest logit",
            "difference": difference,
            "tolerance": TOLERANCE,
        }
    rounded = joined(rounded_logits, rows)
    noise = (rms(rounded - exact) / rms(exact)).item()
    return report | {
        "arithmetic": "bfloat16",
        "measure": "rms of the difference to fp32 arithmetic over rms of the logits",
        "difference": (rms(ours - exact) / rms(exact)).item(),
        "transformers_bf16": noise,
        "tolerance": NOISES * max(noise, BF16_ROUNDING),
    }


def is_ruined(live: LiveLogits, rows: int) -> bool:
    """Whether the live model itself tells no token of the `rows` from another any more, however it is written."""
    logits = joined(live.logits, rows)
    return not logits.isfinite().all() or bool((logits == logits[:, :1]).all())


def joined(logits: list[torch.Tensor], rows: int) -> torch.Tensor:
    """Logits of all prompts under each other, float32[tokens, rows]."""
    return torch.cat([part[..., :rows].flatten(0, 1) for part in logits])


def rms(values: torch.Tensor) -> torch.Tensor:
    """Root mean square."""
    return values.square().mean().sqrt()
