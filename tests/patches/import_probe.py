"""Run in a fresh process by test_imports.py: import what a run needs and print what was seen, as JSON."""

import json
import sys
import time
import typing

ARCHITECTURES = ("Llama", "Mistral", "Gemma", "Gemma2", "Qwen2", "Qwen3", "Qwen3Moe")


def import_everything(seen):
    """What a run imports, and its price."""
    from posttrain import patches
    from posttrain.patches.startup import imports

    seen["cpu of patches"] = time.process_time()
    seen["torch from patches"] = "torch" in sys.modules
    seen["applied"] = patches.apply(patches.Platform(device="cpu", transformer_engine=False))

    import megatron.bridge.training.callbacks
    import megatron.bridge.training.checkpointing
    import megatron.bridge.training.finetune
    import megatron.bridge.training.gpt_step
    import megatron.bridge.training.model_load_save
    import megatron.core.dist_checkpointing  # noqa: F401
    from megatron.bridge import AutoBridge
    from megatron.bridge.peft.canonical_lora import CanonicalLoRA  # noqa: F401
    from megatron.bridge.peft.dora import DoRA  # noqa: F401
    from megatron.bridge.peft.lora import LoRA  # noqa: F401
    from transformers import AutoConfig, AutoTokenizer  # noqa: F401
    from transformers.utils import is_torchvision_available

    AutoConfig.for_model("llama")
    seen["torchvision installed"] = is_torchvision_available()
    for architecture in ARCHITECTURES:
        imports.import_bridge(f"{architecture}ForCausalLM")
    seen["cpu"] = time.process_time()
    seen["modules"] = sorted(sys.modules)
    seen["supported"] = AutoBridge.list_supported_models()


def look_at_flags_and_fusions(seen):
    """Flags of what is installed, and functions that `torch.compile` decorates."""
    import torch
    from megatron.bridge.peft import module_matcher, utils
    from megatron.core.extensions import transformer_engine
    from megatron.core.fusions.fused_bias_swiglu import swiglu
    from megatron.core.jit import jit_fuser

    seen["flags"] = {module.__name__: module.HAVE_TE for module in (module_matcher, utils, transformer_engine)}
    x = torch.randn(3, 8)
    seen["swiglu"] = torch.equal(swiglu(x), torch.nn.functional.silu(x[:, :4]) * x[:, 4:])
    seen["compiled at run time"] = jit_fuser(lambda: 7)()


def convert_configurations(seen):
    """Type hints resolve, configurations become plain data, transformers' own are recognised."""
    from megatron.bridge.peft.canonical_lora import CanonicalLoRA
    from megatron.bridge.peft.dora import DoRA
    from megatron.bridge.peft.lora import LoRA
    from megatron.bridge.training.config import ConfigContainer, TrainingConfig
    from megatron.bridge.training.utils import config_utils
    from transformers.models.llama.configuration_llama import LlamaConfig

    plain = config_utils._ConfigContainerBase._convert_value_to_dict
    seen["hints"] = sorted(typing.get_type_hints(ConfigContainer))
    seen["train"] = plain(TrainingConfig(train_iters=3, global_batch_size=4, micro_batch_size=2))
    seen["peft"] = [plain(kind())["_target_"] for kind in (LoRA, DoRA, CanonicalLoRA)]
    seen["config recognised"] = isinstance(LlamaConfig(), config_utils.PreTrainedConfig)


def use_auto_bridge(seen):
    """From a Hugging Face config to a provider, for a family that is there and for one that nobody has."""
    from megatron.bridge import AutoBridge
    from transformers import LlamaConfig

    tiny = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
    bridge = AutoBridge.from_hf_config(LlamaConfig(**tiny, architectures=["LlamaForCausalLM"]))
    seen["layers"] = bridge.to_megatron_provider(load_weights=False).num_layers
    seen["model class"] = "transformers.models.llama.modeling_llama" in sys.modules
    try:
        AutoBridge.from_hf_config(LlamaConfig(**tiny, architectures=["NothingForCausalLM"]))
    except ValueError as error:
        seen["unsupported"] = str(error)


def use_what_is_deferred(seen):
    """ModelOpt, which is not installed, and wandb, which is."""
    from megatron.bridge.training import checkpointing
    from megatron.core import timers

    seen["nothing to save"] = checkpointing.save_modelopt_state([None], {})
    try:
        checkpointing.restore_modelopt_state([None], {"modelopt_state": {}})
    except ModuleNotFoundError as error:
        seen["missing"] = str(error)

    seen["wandb before"] = "wandb" in sys.modules
    import wandb

    seen["wandb"] = [type(wandb).__name__, callable(wandb.init), type(timers.wandb).__name__, timers.wandb.__name__]


def main():
    seen = {}
    import_everything(seen)
    look_at_flags_and_fusions(seen)
    convert_configurations(seen)
    use_auto_bridge(seen)
    use_what_is_deferred(seen)
    print(json.dumps(seen))


if __name__ == "__main__":
    main()
