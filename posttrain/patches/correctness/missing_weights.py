"""Weights that a model needs and its files don't have."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from posttrain.errors import UserError
from posttrain.patches.registry import Kind, patch, replace

if TYPE_CHECKING:
    from megatron.bridge.models.conversion.model_bridge import MegatronModelBridge, WeightConversionTask
    from megatron.bridge.models.hf_pretrained.causal_lm import PreTrainedCausalLM


@patch(
    "missing-weights",
    kind=Kind.CORRECTNESS,
    symptom="a tensor that the files lack, or call otherwise, is a line in the log, and stays random in the model",
    versions={"megatron-bridge": ">=0.6,<0.7"},
)
def refuse_missing_weights() -> None:
    """End the run before anything is trained."""
    from megatron.bridge.models.conversion.model_bridge import MegatronModelBridge

    plain = MegatronModelBridge.load_weights_hf_to_megatron

    def load(
        self: "MegatronModelBridge", hf_pretrained: "PreTrainedCausalLM", *args: object, **options: object
    ) -> object:
        build = self.build_conversion_tasks

        def checked(*given: object, **more: object) -> object:
            tasks = build(*given, **more)
            check_complete(hf_pretrained, tasks)
            return tasks

        self.build_conversion_tasks = checked
        try:
            return plain(self, hf_pretrained, *args, **options)
        finally:
            del self.build_conversion_tasks

    replace(MegatronModelBridge, load_weights_hf_to_megatron=load)


def check_complete(hf_pretrained: "PreTrainedCausalLM", tasks: "Iterable[WeightConversionTask | None]") -> None:
    """Raise a UserError unless the files have every tensor that the parameters of the model are made of.

    Args:
        hf_pretrained: the model's directory.
        tasks: of Megatron-Bridge, one for each parameter of all ranks; None: it knows no tensor for it.
    """
    names = set(hf_pretrained.state.source.get_all_keys())
    missing = []
    for task in tasks:
        if task is None or task.mapping.allow_hf_name_mismatch:
            continue
        sources = task.mapping.hf_param
        needed = [sources] if isinstance(sources, str) else sources.values()
        missing += [name for name in needed if name not in names]
    if missing:
        raise UserError(
            f"{hf_pretrained.model_name_or_path}: the weights have no {missing[0]} ({len(missing)} tensors are "
            "missing, and would stay random); they are incomplete, or go by other names than this architecture's"
        )
