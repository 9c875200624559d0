"""Is the Hugging Face directory the model that was trained? Tensors by name and shape, logits number by number."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from posttrain.convert.hf_logits import ExportRefused, reference, too_large
from posttrain.errors import UserError
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


@dataclass
class Live:
    """What the live model says: `logits` [n, length, vocabulary] of `tokens` [n, length]; bf16: its arithmetic."""

    tokens: torch.Tensor
    logits: torch.Tensor
    bf16: bool


def verify(directory: Path, model: Any, dtype: str, live: Live | str, device: str) -> dict[str, Any]:
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
    if isinstance(live, Live) and (reason := too_large(model, directory, device)):
        live = reason
    if isinstance(live, str):
        return {"tensors": tensors, "logits": {"checked": False, "reason": live}}
    expected = reference(directory, model, adapter, live.tokens, live.bf16, device)
    report = {"tensors": tensors, "logits": compare(live, *expected)}
    found = report["logits"]
    if not found["difference"] <= found["tolerance"]:  # NaN as well
        raise ExportRefused(
            f"export refused: the logits differ by {found['difference']:.3g} from the trained model's "
            f"({found['measure']}), more than the tolerance of {found['tolerance']:.3g}; nothing was written"
        )
    return report


def compare_base(model: Any, live: Live, device: str) -> dict[str, Any]:
    """Compare the live model before training with what transformers makes of its directory.

    Raises:
        ExportRefused: the logits differ by more than the tolerance.
    """
    if reason := too_large(model, model.directory, device):
        return {"checked": False, "reason": reason}
    found = compare(live, *reference(model.directory, model, False, live.tokens, live.bf16, device))
    if not found["difference"] <= found["tolerance"]:  # NaN as well
        raise ExportRefused(
            f"{model.directory}: the logits of the model as it was loaded differ by {found['difference']:.3g} from "
            f"those of transformers ({found['measure']}), more than the tolerance of {found['tolerance']:.3g}; it is "
            "not trained (trainer.verify=false trains it nevertheless)"
        )
    return found


def model_tensors(directory: Path, model: Any, dtype: str) -> dict[str, Any]:
    """Names, shapes and dtype against the base's."""
    try:
        written = check_directory(directory)
    except UserError as error:
        raise ExportRefused(f"export refused: {error}") from error
    wrong = sorted(name for name, t in written.items() if t.dtype != {"float32": "F32", "bfloat16": "BF16"}[dtype])
    if wrong:
        raise ExportRefused(f"export refused: {wrong[0]} is {written[wrong[0]].dtype}, not {dtype}")
    report: dict[str, Any] = {"count": len(written), "dtype": dtype, "against": "config.json"}
    config = read_json(directory / "config.json")
    if family_of(config) is None:
        report["against"] = "themselves: the model type is not known"
    if not model.random_init:
        families = possible_families(config)
        base = {
            name: tensor
            for name, tensor in read_headers(model.directory).items()
            if not any(family.is_buffer(name) for family in families)
        }
        expected = {name: t.shape for name, t in base.items()}
        if model.rows is not None:
            expected |= {name: (model.rows, *base[name].shape[1:]) for name in base if is_vocabulary(name)}
        same_tensors({name: t.shape for name, t in written.items()}, expected)
        report["against"] = "the base's tensors"
    return report


def adapter_tensors(directory: Path, model: Any) -> dict[str, Any]:
    """Every tensor belongs to a matrix of the base and has its shape."""
    try:
        _, pairs, written = read_adapter(directory)
        if not model.random_init:
            check_against(read_headers(model.directory), pairs, written)
    except UserError as error:
        raise ExportRefused(f"export refused: {error}") from error
    against = "their own pairs" if model.random_init else "the base's matrices"
    return {"count": len(written), "dtype": sorted({t.dtype for t in written.values()}), "against": against}


def same_tensors(written: dict[str, tuple], expected: dict[str, tuple]) -> None:
    """Raise ExportRefused unless names and shapes are the same."""
    missing, extra = sorted(expected.keys() - written.keys()), sorted(written.keys() - expected.keys())
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


def compare(live: Live, exact: torch.Tensor, rounded: torch.Tensor | None = None) -> dict[str, Any]:
    """Difference of the logits and its tolerance, both relative to the logits' size."""
    ours = live.logits[..., : exact.size(-1)]  # tensor parallelism may have padded the vocabulary
    report: dict[str, Any] = {"checked": True, "tokens": live.tokens.numel()}
    if rounded is None:
        difference = ((ours - exact).abs().max() / exact.abs().max()).item()
        return report | {
            "arithmetic": "float32", "measure": "largest difference over largest logit",
            "difference": difference, "tolerance": TOLERANCE,
        }  # fmt: skip
    noise = (rms(rounded - exact) / rms(exact)).item()
    return report | {
        "arithmetic": "bfloat16", "measure": "rms of the difference to fp32 arithmetic over rms of the logits",
        "difference": (rms(ours - exact) / rms(exact)).item(), "transformers_bf16": noise,
        "tolerance": NOISES * max(noise, BF16_ROUNDING),
    }  # fmt: skip


def rms(values: torch.Tensor) -> torch.Tensor:
    """Root mean square."""
    return values.square().mean().sqrt()
