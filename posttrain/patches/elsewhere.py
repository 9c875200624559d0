"""Changes to upstream that are made in other modules of the package, where what they need is at hand.

Each is registered here, so that `doctor` lists all and the check at start covers them; a test finds those that are not.
What a patch can do becomes a patch instead.
"""

from dataclasses import dataclass

from posttrain.patches.registry import Change, Kind, everywhere


@dataclass(frozen=True)
class ChangeElsewhere(Change):
    """A change that another module makes.

    Attributes:
        module: where it is made.
        targets: what is changed there, as the test finds it: a dotted name of upstream's, or an attribute's name where
            it is an object's.
    """

    module: str
    targets: tuple[str, ...]


def _elsewhere(
    name: str, module: str, *targets: str, kind: Kind, symptom: str, versions: dict[str, str]
) -> ChangeElsewhere:
    return ChangeElsewhere(name, kind, symptom, versions, everywhere, module, targets)


BRIDGE = {"megatron-bridge": ">=0.6,<0.7"}
CORE = {"megatron-core": ">=0.19,<0.20"}
HYDRA = {"hydra-core": ">=1.3.8,<1.4"}

HYDRA_GUARD = _elsewhere(
    "hydra-guard",
    "posttrain.config.hydra_guard",
    "hydra._internal.hydra.ConfigLoaderImpl",
    "hydra.core.utils._save_config",
    "hydra._internal.sources_registry.SourcesRegistry.instance().types",
    kind=Kind.CORRECTNESS,
    symptom="a configuration file from somebody else can run code through Hydra's own settings",
    versions=HYDRA,
)

CHANGES = (
    HYDRA_GUARD,
    _elsewhere(
        "secrets-stay-in-env",
        "posttrain.config.secrets",
        "omegaconf.OmegaConf.register_new_resolver(oc.env)",
        kind=Kind.CORRECTNESS,
        symptom="${oc.env:HF_TOKEN} writes a secret into the run's files",
        versions={"omegaconf": ">=2.3,<2.4"},
    ),
    _elsewhere(
        "bounded-interpolations",
        "posttrain.config.expansion",
        "omegaconf.base.Container.resolve_parse_tree",
        kind=Kind.CORRECTNESS,
        symptom="a few keys that refer to each other fill the memory",
        versions={"omegaconf": ">=2.3,<2.4"},
    ),
    _elsewhere(
        "no-torchscript",
        "posttrain.checkpoint.pickles",
        "torch.serialization._is_torchscript_zip",
        "torch.jit.load",
        kind=Kind.CORRECTNESS,
        symptom="a checkpoint from somebody else can run code as a TorchScript archive",
        versions={"torch": ">=2.9,<2.13"},
    ),
    _elsewhere(
        "compose-in-a-command",
        "posttrain.config.composition",
        "hydra.core.global_hydra.GlobalHydra.instance().hydra",
        kind=Kind.CORRECTNESS,
        symptom="composing inside a command takes Hydra's state from the command",
        versions=HYDRA,
    ),
    _elsewhere(
        "bridges",
        "posttrain.models.bridges",
        "megatron.bridge.models.conversion.model_bridge.MegatronModelBridge.register_bridge",
        kind=Kind.CORRECTNESS,
        symptom="every family gets upstream's bridge: scaled rotary embeddings, windows, biases and activations of "
        "config.json are lost, LoRA before a norm, packed sequences refused, a load-balancing loss that nobody asked "
        "for; GPT-2, GPT-NeoX and Mixtral have none",
        versions=BRIDGE,
    ),
    _elsewhere(
        "gpt2-is-causal",
        "posttrain.models.bridges.gpt2_bridge",
        "megatron.bridge.models.conversion.auto_bridge.SUPPORTED_HF_ARCHITECTURES",
        kind=Kind.STARTUP,
        symptom="AutoBridge refuses GPT-2, whose architecture does not end like other causal models'",
        versions=BRIDGE,
    ),
    _elsewhere(
        "grown-embeddings",
        "posttrain.models.hf",
        "load_tensors",
        kind=Kind.CORRECTNESS,
        symptom="a model whose template adds tokens cannot be read: its files have fewer embeddings than it",
        versions=BRIDGE,
    ),
    _elsewhere(
        "filled-up-vocabulary",
        "posttrain.models.padding",
        "load_tensors",
        kind=Kind.CORRECTNESS,
        symptom="a filled-up vocabulary cannot be read by one process: upstream fills it up for several alone",
        versions=BRIDGE,
    ),
    _elsewhere(
        "fused-mlp",
        "posttrain.ops.fused_mlp",
        "__class__",
        kind=Kind.CORRECTNESS,
        symptom="the MLP is computed by a formula of this project, which must be that of core's",
        versions=CORE,
    ),
    _elsewhere(
        "fused-queries",
        "posttrain.ops.query_key_value",
        "__class__",
        kind=Kind.CORRECTNESS,
        symptom="queries, keys and values are split, normalised and rotated by kernels of this project, as core does",
        versions=CORE,
    ),
    _elsewhere(
        "packed-attention",
        "posttrain.models.local_spec",
        "__class__",
        kind=Kind.CORRECTNESS,
        symptom="gradients of packed rows whose heads have more than 128 features are wrong by a fifth, or not finite",
        versions=CORE,
    ),
    _elsewhere(
        "rates-in-proportion",
        "posttrain.train.learning_rates",
        "__class__",
        kind=Kind.CORRECTNESS,
        symptom="LoRA+: the warm-up of all parameters begins at one rate, so that its ratio holds at the end alone",
        versions=CORE,
    ),
    _elsewhere(
        "state-without-copies",
        "posttrain.train.bf16_adam",
        "megatron.core.optimizer.Adam",
        kind=Kind.CORRECTNESS,
        symptom="optimizer=adam_bf16: saving makes fp32 copies of all moments, loading a second state: out of memory",
        versions=CORE,
    ),
    _elsewhere(
        "nonfinite-gradients",
        "posttrain.train.nonfinite",
        "prepare_grads",
        kind=Kind.CORRECTNESS,
        symptom="trainer.on_nonfinite=skip, or rollback without clipping: weights take a gradient that is not finite",
        versions=CORE,
    ),
    _elsewhere(
        "save-without-copies",
        "posttrain.convert.mmap_weights",
        "megatron.core.dist_checkpointing.strategies.torch.MCoreSavePlanner.resolve_data",
        kind=Kind.STARTUP,
        symptom="a conversion into Megatron's format holds most of the model in memory twice",
        versions=CORE,
    ),
    _elsewhere(
        "counted-reads",
        "posttrain.convert.megatron",
        "load_tensors",
        kind=Kind.STARTUP,
        symptom="a conversion shows no progress while it reads",
        versions=BRIDGE,
    ),
    _elsewhere(
        "recipes-without-the-hub",
        "posttrain.recipes.description",
        "megatron.bridge.AutoBridge.from_hf_pretrained",
        "transformers.AutoTokenizer.from_pretrained",
        "sys.modules",
        kind=Kind.STARTUP,
        symptom="reading a recipe downloads its model, and imports every other recipe",
        versions=BRIDGE,
    ),
    _elsewhere(
        "tokenizer-without-torch",
        "posttrain.models.tokenizer",
        "sys.modules",
        kind=Kind.STARTUP,
        symptom="preview imports torch to load a tokenizer (3 s)",
        versions={"transformers": ">=5.8,<5.13"},
    ),
    _elsewhere(
        "offline-evaluation",
        "posttrain.evaluate.harness",
        "datasets.config.HF_HUB_OFFLINE",
        "datasets.config.HF_DATASETS_OFFLINE",
        kind=Kind.STARTUP,
        symptom="a task of lm-eval downloads its data by itself",
        versions={"datasets": ">=3"},
    ),
)
