"""A PEFT adapter put on a transformers model by PEFT itself, with a configuration of our own instead of the file's."""

from pathlib import Path
from statistics import mode
from typing import TYPE_CHECKING

from posttrain.errors import UserError
from posttrain.models.hf_adapter import CONFIG, read_adapter, saved_vocabulary

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def attach_adapter(model: "PreTrainedModel", directory: Path, device: str | None = None) -> "PeftModel":
    """The PeftModel of a transformers model and the adapter in `directory`.

    PEFT gets each adapted module by its name with the rank of its tensors, so that nothing in adapter_config.json is
    searched for, built or imported. The base's embedding grows first where the adapter brings one with more rows.

    Args:
        model: of the adapter's base; changed in place.
        directory: a PEFT directory.
        device: where to put the adapter; None: PEFT's choice.

    Raises:
        UserError: see `read_adapter`; or PEFT can't put these weights on this model.
    """
    from peft import LoraConfig, PeftModel

    config, pairs, _ = read_adapter(directory)
    rank = mode(pair.rank for pair in pairs.values())
    alpha = mode(pair.alpha for pair in pairs.values())
    ours = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=alpha,
        target_modules=sorted(pairs),
        inference_mode=True,
        rank_pattern={f"^{module}": pair.rank for module, pair in pairs.items() if pair.rank != rank},
        alpha_pattern={f"^{module}": pair.alpha for module, pair in pairs.items() if pair.alpha != alpha},
        use_rslora=bool(config.get("use_rslora")),
        use_dora=bool(config.get("use_dora")),
        fan_in_fan_out=config.get("fan_in_fan_out") is True,
    )
    rows = max((tensor.shape[0] for tensor in saved_vocabulary(directory).values()), default=0)
    if rows > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(rows, mean_resizing=False)  # PEFT fills them
    try:
        return PeftModel.from_pretrained(model, str(directory), config=ours, torch_device=device)
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise UserError(f"{directory / CONFIG}: PEFT can't put this adapter on its base: {reason[:300]}") from error
