"""The run's live model as a Hugging Face directory, and the proof that it starts as the files given."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from posttrain.convert.export import Source, check_base, export_source
from posttrain.convert.trained_tokenizer import TrainedTokenizer
from posttrain.convert.training_metadata import collect_facts
from posttrain.train.context import RunContext

if TYPE_CHECKING:
    from posttrain.train.megatron_config import MegatronModel


class Exporter:
    """Writes RUN_DIR/adapter (PEFT) or RUN_DIR/hf (the whole model).

    Args:
        run: the run.
        model: what its model is built from.
    """

    def __init__(self, run: RunContext, model: "MegatronModel") -> None:
        self.run = run
        self.model = model
        self.base_check: dict[str, Any] | None = None

    def check_base(self, parts: list[torch.nn.Module]) -> None:
        """See that the model is what transformers reads from the files given; a collective call.

        Costs seconds, not hours afterwards.

        Raises:
            ExportRefused: it isn't.
        """
        devices = [torch.cuda.current_device()] if self.run.on_gpu else []
        with torch.random.fork_rng(devices=devices):
            source = self.source(parts)
            source.unchecked = self.why_incomparable()
            self.base_check = check_base(source)
        if self.run.on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def export(self, parts: list[torch.nn.Module], results: dict[str, Any]) -> Path:
        """Write the directory, tokenizer included; a collective call.

        Args:
            parts: the Megatron model's chunks of this process.
            results: of the run, for the model card: losses, steps, supervised tokens.

        Returns:
            The directory.

        Raises:
            ExportRefused: it is not the model that was trained; on every process.
        """
        source = self.source(parts)
        source.facts = collect_facts(self.run.config, results, self.run.splits.report)
        name = "hf" if self.model.peft is None else "adapter"
        return export_source(source, self.run.run_dir / name, overwrite=True)

    def source(self, parts: list[torch.nn.Module]) -> Source:
        """The live model, with why its logits can't be compared, if they can't."""
        groups = self.run.groups
        device = self.run.platform.device
        tokenizer = TrainedTokenizer(groups.model, groups.objective.template(groups.template), self.run.tokenizer)
        return Source(
            model=groups.model,
            bridge=self.model.bridge,
            parts=parts,
            peft=self.model.peft,
            dtype=getattr(torch, groups.precision.dtype(device)),
            device=device,
            unchecked=self.why_unchecked(),
            tokenizer=tokenizer,
            base=self.base_check,
        )

    def why_unchecked(self) -> str | None:
        """Why the export's logits are not compared with the trained model's; None: they are."""
        if not self.run.settings.verify:
            return "trainer.verify=false"
        return self.why_incomparable()

    def why_incomparable(self) -> str | None:
        """Why the live model's logits can't be compared with transformers'; None: they can."""
        if self.run.spec.context > 1:
            return "logits of one sequence are divided over processes (context parallelism)"
        if self.run.spec.precision == "fp8":
            return "fp8 arithmetic has no counterpart in transformers"
        return None
