"""What Megatron imports for a text run, and what it leaves for when it is used.

`import megatron.bridge` loads every model family, diffusion and vision code, trackers, a quantisation toolkit and two
compilers: half a minute in which most of what is loaded is never called, and a failure where one of those packages is
not installed. With this patch an import of Megatron loads what the importing module needs itself (patches/deferred.py).
Nothing is replaced by an imitation: what is deferred is the real thing once it is used, and a package that is not
installed is named when something asks for it.
"""

import importlib
import importlib.util
import os
import re
from collections.abc import Callable
from functools import cache, wraps
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

from posttrain.patches.deferred import Rule, defer, executing, installed, is_deferred, lazy, on_import
from posttrain.patches.registry import Kind, patch, replace

type Function = Callable[..., Any]


def _always(*args: object, **kwargs: object) -> bool:
    return True


def _no_modelopt_state(model: object, state_dict: dict[str, object]) -> bool:
    return not any(key.startswith("modelopt_state") for key in state_dict)


RULES = (
    # ModelOpt (7 s) distils and quantises. Training, checkpoints and conversion ask it about every model, but as long
    # as it is not loaded no model can be one of its own.
    Rule(
        ("megatron",),
        ("modelopt",),
        missing_too=True,
        in_functions=True,
        idle={
            "modelopt.torch.distill.plugins.megatron:get_tensor_shapes_adjust_fn_for_distillation": _always,
            "modelopt.torch.opt.plugins:save_modelopt_state": _always,
            "modelopt.torch.opt.plugins:save_sharded_modelopt_state": _always,
            "modelopt.torch.opt.plugins:restore_modelopt_state": _no_modelopt_state,
            "modelopt.torch.quantization.utils:is_quantized": _always,
        },
    ),
    Rule(("megatron",), ("nvidia_resiliency_ext.inprocess", "megatron.energon"), missing_too=True),
    # wandb (2 s) is one comparison in the timers; a storage client (1 s) for object stores nobody has asked for.
    Rule(("megatron",), ("wandb", "torch.utils.tensorboard", "multistorageclient")),
    # What compiles C++ at run time brings setuptools, and a warning that there is no CUDA.
    Rule(("megatron.core.tensor_parallel.random",), ("torch.utils.cpp_extension",)),
    Rule(("megatron.core.distributed",), ("megatron.core.nccl_allocator",)),
    Rule(("megatron.core.inference.contexts",), ("megatron.core.inference.contexts.dynamic_context",)),
    # Linear attention's kernels (3 s) are for models that have such layers.
    Rule(("megatron.core.ssm",), ("fla",)),
    # Transformer Engine's export to ONNX wants onnxscript (2 s), which is not even installed with it.
    Rule(("transformer_engine.pytorch.export",), ("transformer_engine.pytorch.onnx_extensions",)),
    # DTensor's rules for its operators ask sympy (1.6 s) about symbolic shapes, which only tracing has.
    Rule(("torch.distributed.tensor",), ("torch.fx.experimental.symbolic_shapes",)),
    # The model classes of transformers (5 s with Dynamo) are keys in AutoBridge's registry: see `_keys_for_classes`.
    Rule(
        ("megatron",),
        (
            "transformers:[A-Z]*[a-z]*",
            "transformers.modeling_utils:PreTrainedModel",
            "transformers.generation.utils:GenerateOutput",
            "transformers.models.auto.modeling_auto:MODEL_FOR_MASKED_LM_MAPPING",
        ),
    ),
    # The tokenizers' automatic class leads here; masks made under vmap want Dynamo (3 s).
    Rule(("transformers.masking_utils",), ("torch._dynamo",)),
    # The fused LoRA layer names Transformer Engine's types at module level.
    Rule(("megatron.bridge.peft.lora_layers",), ("transformer_engine",), missing_too=True, only_missing=True),
    # The config container's unions of every dataset there is.
    Rule(
        ("megatron.bridge",),
        (
            "megatron.bridge.data.builders.direct_hf_sft",
            "megatron.bridge.data.builders.energon",
            "megatron.bridge.data.builders.mock_vlm_sft",
            "megatron.bridge.data.sources.hf",
            "megatron.bridge.data.datasets.gpt_sft",
            "megatron.bridge.training.post_training",
        ),
    ),
)


def _compile_on_first_call() -> None:
    """`torch.compile` loads Dynamo and Inductor (3 s) when it decorates: let a decorated function wait for its call."""
    import torch

    compile_now = torch.compile

    @wraps(compile_now)
    def compile_later(model: Function | None = None, **options: Any) -> Function:
        if not executing() or not isinstance(model, FunctionType):
            return compile_now(model, **options)
        compiled: Function | None = None

        @wraps(model)
        def call(*args: object, **kwargs: object) -> object:
            nonlocal compiled
            if torch.compiler.is_compiling():  # inside another one: traced as a part of it
                return model(*args, **kwargs)
            if compiled is None:
                disabled = os.environ.get("TORCHDYNAMO_DISABLE") == "1"
                compiled = model if disabled else compile_now(model, **options)
            return compiled(*args, **kwargs)

        return call

    replace(torch, compile=compile_later)


def _true_te_flags(module: ModuleType) -> None:
    """Without Transformer Engine core's names for its layers are MagicMocks: they must count as missing."""
    safe_import_from = module.safe_import_from

    @wraps(safe_import_from)
    def checked(name: str, symbol: str, **kwargs: object) -> object:
        if name == "megatron.core.extensions.transformer_engine" and not installed("transformer_engine"):
            name = "transformer_engine"
        return safe_import_from(name, symbol, **kwargs)

    replace(module, safe_import_from=checked)


@cache
def _key(name: str) -> type:
    """The class that stands for a model class of transformers in AutoBridge's registry."""
    return type(name, (), {"__module__": "transformers"})


def _keys_for_classes(module: ModuleType) -> None:
    """Register bridges under `_key` instead of the model class of that name, which would have to be loaded."""
    create_bridge_decorator = module.create_bridge_decorator

    @wraps(create_bridge_decorator)
    def create(*, source: type | str, **kwargs: object) -> Function:
        if is_deferred(source):
            source = _key(str(source.__name__))
        decorator: Function = create_bridge_decorator(source=source, **kwargs)
        return decorator

    replace(module, create_bridge_decorator=create)


def _families_on_demand(module: ModuleType) -> None:
    """Let AutoBridge import a model's family when asked whether it supports the model, and find it under `_key`."""
    transformers = module.transformers
    registry = module.model_bridge.get_model_bridge._exact_types
    supports = module.AutoBridge.supports.__func__

    class Classes:
        def __getattr__(self, name: str) -> object:
            if name in registry:  # registered by name: AutoBridge takes the name where there is no class
                raise AttributeError(name)
            key = _key(name)
            return key if key in registry else getattr(transformers, name)

    def supports_after_import(cls: type, config: object) -> bool:
        for architecture in getattr(config, "architectures", None) or ():
            import_bridge(architecture)
        supported: bool = supports(cls, config)
        return supported

    replace(module, transformers=Classes())
    replace(module.AutoBridge, supports=classmethod(supports_after_import))


@patch(
    "imports",
    kind=Kind.STARTUP,
    symptom="importing megatron.bridge takes half a minute, and fails without packages that a text run never uses",
    versions={"megatron-bridge": ">=0.6,<0.7", "megatron-core": ">=0.19,<0.20"},
)
def defer_imports() -> None:
    """Defer what a text run does not use. Must come before anything of Megatron is imported."""
    _compile_on_first_call()
    defer(*RULES)
    lazy("megatron.bridge", "megatron.training")
    on_import("megatron.bridge.utils.import_utils", _true_te_flags)
    on_import("megatron.bridge.models.conversion.model_bridge", _keys_for_classes)
    on_import("megatron.bridge.models.conversion.auto_bridge", _families_on_demand)


@cache
def bridge_modules() -> dict[str, str]:
    """Hugging Face architecture -> module of megatron.bridge with the bridge for it, found without importing any."""
    spec = importlib.util.find_spec("megatron.bridge")
    if spec is None or spec.origin is None:
        return {}
    root = Path(spec.origin).parent
    modules: dict[str, str] = {}
    for path in sorted((root / "models").rglob("*_bridge.py")):
        if path.parent.name == "conversion":  # the machinery, with examples in its docstrings
            continue
        text = path.read_text(encoding="utf-8")
        for source in re.findall(r"register_bridge\(\s*source=\"?(\w+)", text):
            constant = re.search(rf'^{source}\s*=\s*"(\w+)"', text, re.MULTILINE)
            module = ".".join(("megatron.bridge", *path.relative_to(root).with_suffix("").parts))
            architecture = constant[1] if constant else source
            modules[architecture] = module
    return modules


def import_bridge(architecture: str | None) -> None:
    """Import the bridge of an architecture; None, or one that no bridge names, imports those of all text models.

    Args:
        architecture: an entry of `architectures` of the model's config.json.
    """
    from posttrain.models.bridges import register

    if register(architecture):
        return
    modules = bridge_modules()
    if architecture in modules:
        importlib.import_module(modules[architecture])
        return
    for name, module in modules.items():
        if name.endswith("ForCausalLM"):
            importlib.import_module(module)
