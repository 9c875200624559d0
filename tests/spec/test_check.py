"""What is found wrong before anything heavy starts."""

import json
import re

import pytest
from omegaconf import OmegaConf

from posttrain.config.composition import compose
from posttrain.errors import UserError
from posttrain.models.headers import read_json
from posttrain.spec import checks, model_checks
from posttrain.utils import gpus

LLAMA = ["model=llama3_8b"]
MEGATRON = "+trainer.megatron.model."
FIRST = f"{MEGATRON}num_layers_in_first_pipeline_stage"
LAST = f"{MEGATRON}num_layers_in_last_pipeline_stage"
VIRTUAL = f"{MEGATRON}virtual_pipeline_model_parallel_size"
LAYOUT = f"{MEGATRON}pipeline_model_parallel_layout"
LOSS = f"{MEGATRON}account_for_loss_in_pipeline_split=true"
ENDS = f"{MEGATRON}account_for_embedding_in_pipeline_split=true"
AGAIN = ["trainer.recompute=full"]


@pytest.mark.parametrize(
    "words, gpus, expected",
    [
        (["trainer.max_steps=0"], 0, "`trainer.max_steps=0`: must be at least 1"),
        (["peft.dropout=1.0"], 0, "`peft.dropout=1.0`: must be less than 1"),
        (["precision=fp8"], 0, "`precision=fp8`: needs an Ada, Hopper or newer GPU, and there is none here"),
        (["precision.name=fp9"], 0, "must be one of auto, fp32, bf16, fp8"),
        (
            ["checkpoint.keep_best=true", "trainer.validation_interval=null"],
            0,
            "`checkpoint.keep_best=true`: compares losses during training; set trainer.validation_interval",
        ),
        (
            ["trainer.export=best", "trainer.validation_interval=null"],
            0,
            "`trainer.export=best`: compares losses during training; set trainer.validation_interval",
        ),
        (
            ["trainer.export=best", "trainer.validation_interval=2", "data.validation_path=null"],
            0,
            "`trainer.export=best`: compares validation losses, and there is no validation set; set "
            "data.validation_fraction or data.validation_path",
        ),
        (
            ["trainer.early_stopping.patience=2", "trainer.validation_interval=null"],
            0,
            "`trainer.early_stopping.patience=2`: compares losses during training",
        ),
        (["trainer.early_stopping.patience=0"], 0, "`trainer.early_stopping.patience=0`: must be at least 1"),
        (["trainer.early_stopping.min_delta=-1"], 0, "`trainer.early_stopping.min_delta=-1.0`: must be at least 0"),
        (["trainer.export=first"], 0, "`trainer.export=first`: must be one of last, best, true, false"),
        (["trainer.export=best", "trainer.validation_interval=2", "checkpoint.save=false"], 0, "kept in a checkpoint"),
        (["trainer.epochs=1", "trainer.max_steps=5"], 0, "`trainer.max_steps` and `trainer.epochs`"),
        (["optimizer.min_lr=1"], 0, "`optimizer.min_lr=1.0`: above optimizer.lr"),
        (["scheduler.lr_warmup_iters=3"], 0, "lr_warmup_fraction is set as well"),
        (["launch.node_rank=1"], 0, "`launch.node_rank=1`: must be below launch.nnodes=1"),
        (["launch.nnodes=2"], 0, "`launch.master_port`"),
        (["model.path=./nowhere"], 0, "`model.path=./nowhere`: there is no such directory"),
        (["model.path=/nowhere"], 0, "there is no such directory"),
        (["trainer.micro_batch_size=3"], 0, "must be a multiple of micro_batch_size x data-parallel size = 3 x 1 = 3"),
        (
            ["trainer.global_batch_size=9"],
            2,
            "= 1 x 2 = 2 (2 processes: one for each of 2 visible GPUs); trainer.global_batch_size=8 or "
            "parallelism.nproc_per_node=1 would do",
        ),
        (
            [*LLAMA, "parallelism=ep2", "parallelism.nproc_per_node=3", "trainer.global_batch_size=3"],
            4,
            "size 3 (3 processes: parallelism.nproc_per_node=3); change the sizes in parallelism, or the batch",
        ),
        (["parallelism=tp2"], 0, "the model's 9 attention heads can't be divided by it; possible: 1, 3, 9"),
        ([*LLAMA, "parallelism=tp2", "parallelism.nproc_per_node=3"], 0, "3 processes can't be divided"),
        ([*LLAMA, "parallelism=single", "parallelism.nproc_per_node=4"], 2, "this machine has 2 visible GPUs"),
        (
            ["model=pythia_70m", "parallelism=pp2", "parallelism.pipeline_model_parallel_size=8"],
            8,
            "`parallelism.pipeline_model_parallel_size=8`: each stage needs a layer, of which the model has 6",
        ),
        ([*LLAMA, "parallelism=pp2", FIRST + "=0"], 2, "num_layers_in_first_pipeline_stage=0`: must be a positive"),
        ([*LLAMA, "parallelism=pp2", FIRST + "=32"], 2, "leaves 0 layers for 1 equal stages, of the model's 32"),
        ([*LLAMA, "parallelism=pp2", FIRST + "=16", LAST + "=17"], 2, "leaves -1 layers for 0 equal stages"),
        ([*LLAMA, "parallelism=pp2", LOSS], 2, "account_for_loss_in_pipeline_split leaves 33 layers for 2 equal"),
        ([*LLAMA, "parallelism=pp2", LOSS, LAST + "=12"], 2, "does not go with account_for_loss_in_pipeline_split"),
        ([*LLAMA, "parallelism=pp2", VIRTUAL + "=x"], 2, "parallel_size=x`: must be a positive whole number"),
        (
            ["parallelism=pp2", "parallelism.pipeline_model_parallel_size=4", VIRTUAL + "=1"],
            4,
            "leaves 30 layers for 4",
        ),
        ([*LLAMA, "parallelism=pp2", VIRTUAL + "=2", FIRST + "=15"], 2, "=15`: must be a multiple of virtual_pipeline"),
        (
            [*LLAMA, "parallelism=pp2", LAYOUT + "='Et*17|t*15L'", LAST + "=15"],
            2,
            "layout`: does not go with num_layers",
        ),
        ([*LLAMA, LAST + "=12"], 0, "last_pipeline_stage`: there is one stage; remove it"),
        ([*LLAMA, VIRTUAL + "=2"], 0, "parallel_size`: there is one stage; remove it"),
        ([*LLAMA, LAYOUT + "='Et*17|t*15L'"], 0, "layout`: there is one stage; remove it"),
        (
            ["+trainer.megatron.model=3"],
            0,
            "trainer.megatron.model=3: must hold keys; +trainer.megatron.model.KEY=VALUE",
        ),
        (["+trainer.megatron.ddp=null"], 0, "trainer.megatron.ddp=None: must hold keys"),
        (
            [f"{MEGATRON}tensor_model_parallel_size=2"],
            0,
            "set parallelism.tensor_model_parallel_size instead",
        ),
        (["+trainer.megatron.train.global_batch_size=4"], 0, "set trainer.global_batch_size instead"),
        (["+trainer.megatron.model.recompute_method=uniform"], 0, "set trainer.recompute=full and, for some"),
        (["+trainer.megatron.model.recompute_num_layers=2"], 0, "trainer.recompute_layers instead"),
        (["+trainer.megatron.model.cpu_offloading=true"], 0, "set trainer.offload_layers instead"),
        (["+trainer.megatron.ddp.use_distributed_optimizer=true"], 0, "set parallelism.distributed_optimizer instead"),
        ([*LLAMA, "parallelism=cp2"], 0, "Transformer Engine's, which needs GPUs"),
        (["trainer.recompute_layers=3"], 0, "has no effect with trainer.recompute=auto; add trainer.recompute=full"),
        (
            [*AGAIN, "trainer.recompute_layers=31"],
            0,
            "`trainer.recompute_layers=31`: the model has 30 layers; set 1 to 30",
        ),
        (
            [*LLAMA, *AGAIN, "parallelism=pp2", "trainer.recompute_layers=18"],
            2,
            "`trainer.recompute_layers=18`: of the model's 32 layers no pipeline stage has more than 17; set 1 to 17",
        ),
        ([*LLAMA, *AGAIN, "parallelism=pp2", FIRST + "=20", "trainer.recompute_layers=21"], 2, "has more than 20;"),
        ([*LLAMA, *AGAIN, "parallelism=pp2", VIRTUAL + "=2", "trainer.recompute_layers=9"], 2, "has more than 8;"),
        (
            ["model=pythia_70m", *AGAIN, "parallelism=pp2", ENDS, LOSS, "trainer.recompute_layers=4"],
            2,
            "of the model's 6 layers no pipeline stage has more than 3;",
        ),
        ([*LLAMA, "trainer.offload_layers=33"], 1, "`trainer.offload_layers=33`: the model has 32 layers; set 1 to 32"),
        (["trainer.offload_layers=31"], 0, "`trainer.offload_layers=31`: the model has 30 layers"),
        ([*LLAMA, "parallelism=pp2", "trainer.offload_layers=4"], 2, "a pipeline has several micro-batches under way"),
        ([*LLAMA, "parallelism=fsdp", "trainer.offload_layers=4"], 2, "Megatron-FSDP was not tried with it"),
        ([*LLAMA, "peft=none", "trainer.offload_layers=4"], 1, "only plain LoRA as one operation with its layer"),
        (["model=gemma2_2b", "parallelism=cp2"], 2, "attention scores are soft-capped"),
        (["model=gemma_7b", "parallelism=cp2"], 2, "heads have 256 features"),
        ([*LLAMA, "parallelism=tp2", "parallelism.fsdp=true"], 2, "is for data-parallel processes alone"),
        ([*LLAMA, "parallelism=fsdp", "checkpoint.async_save=true"], 2, "written while training waits"),
        ([*LLAMA, "parallelism=fsdp", "precision=fp8", "peft=dora"], 2, "not every linear layer is one operation"),
        (["model=mixtral_8x7b", "parallelism=fsdp", "precision=fp8"], 2, "bits, and this project's are off: experts: "),
        (
            [*LLAMA, "parallelism=fsdp", "precision=fp8", "+trainer.megatron.ddp.fsdp_double_buffer=true"],
            2,
            "`trainer.megatron.ddp.fsdp_double_buffer`: layers would share buffers",
        ),
        (
            [
                *LLAMA,
                "parallelism=fsdp",
                "precision=fp8",
                "+trainer.megatron.ddp.data_parallel_sharding_strategy=optim",
            ],
            2,
            "`trainer.megatron.ddp.data_parallel_sharding_strategy=optim`: frozen weights in 8 bits are read",
        ),
        ([*LLAMA, "parallelism=zero1", "optimizer=sgd"], 2, "Megatron divides Adam's state alone"),
        ([*LLAMA, "parallelism=fsdp", "optimizer=sgd"], 2, "Megatron divides Adam's state alone"),
        (["peft=none", "optimizer=adam_bf16"], 0, "it requires a GPU with Transformer Engine"),
        ([*LLAMA, "peft=none", "optimizer=adam_bf16", "optimizer.adam_beta2=0.999"], 1, "at most 0.98, since a mean"),
        ([*LLAMA, "parallelism=ep2"], 2, "this model has no experts"),
        ([*LLAMA, "parallelism=tp8", "trainer.seq_length=100"], 8, "must be a multiple of tensor_model_parallel_size"),
        (["checkpoint.async_save=true"], 0, "needs a GPU"),
        (["model=gpt2", "trainer.seq_length=2048"], 0, "sequences up to 1024 tokens only"),
        (["model=mixtral_8x7b", "parallelism=tp2", "parallelism.sequence_parallel=false"], 2, "mixture of experts"),
        (["model=mixtral_8x7b", "peft=dora"], 0, "`peft=dora`: of experts PEFT knows LoRA alone"),
        (["trainer.generation_interval=2", "parallelism=pp2"], 0, "leave it out, and ask the run's checkpoints"),
        (["trainer.generation_interval=2", "trainer.num_generations=0"], 0, "leaves no prompts"),
        (["peft=none", "peft.rank=8"], 0, "`peft.rank`: has no effect"),
        (["peft=dora", "peft.rslora=true"], 0, "`peft.rslora`: has no effect"),
        (["+foo.bar=1"], 0, "`foo`: unknown key"),
        (["peft._target_=os.system"], 0, "not a target that a configuration may name"),
    ],
)
def test_refused(words, gpus, expected):
    with pytest.raises(UserError) as error:
        checks.check(compose(words), gpus)
    assert expected in str(error.value)


@pytest.mark.parametrize(
    "words, gpus",
    [
        (["trainer.recompute_layers=30"], 0),
        ([*LLAMA, "parallelism=pp2", "trainer.recompute_layers=17"], 2),
        ([*LLAMA, "parallelism=pp2", FIRST + "=20", "trainer.recompute_layers=20"], 2),
        ([*LLAMA, "parallelism=pp2", VIRTUAL + "=2", "trainer.recompute_layers=8"], 2),
        ([*LLAMA, "trainer.offload_layers=32"], 1),
    ],
)
def test_all_layers_may_be_computed_again_or_wait(words, gpus):
    checks.check(compose([*AGAIN, *words]), gpus)


def test_a_model_on_a_hub_may_have_activations_that_can_wait_on_the_host(monkeypatch):
    """Its architecture isn't known yet; what can be known to be wrong is said all the same."""
    gpu = checks.patches.Platform("cuda", transformer_engine=True)
    monkeypatch.setattr(checks.patches.Platform, "with_gpus", lambda visible: gpu)
    words = ["model=hf", "model.path=somebody/something", "trainer.offload_layers=2"]
    checks.check_settings(compose(words), 1)
    with pytest.raises(UserError, match="attention in fp32"):
        checks.check_settings(compose([*words, "trainer.cuda_graph=true", "precision=fp32"]), 1)


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """A machine whose nvidia-smi lists these GPUs, by name and compute capability."""

    def has(*listed):
        lines = [f"{index}, GPU-{index}, {name}, 81920, {cap}\n" for index, (name, cap) in enumerate(listed)]
        script = tmp_path / "nvidia-smi"
        script.write_text("#!/bin/sh\ncat <<END\n" + "".join(lines) + "END\n", encoding="utf-8")
        script.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        gpus._query_gpus.cache_clear()

    gpu = checks.patches.Platform("cuda", transformer_engine=True)
    monkeypatch.setattr(checks.patches.Platform, "with_gpus", lambda visible: gpu)
    yield has
    gpus._query_gpus.cache_clear()


A100 = ("NVIDIA A100-SXM4-80GB", "8.0")
H100 = ("NVIDIA H100 80GB HBM3", "9.0")
ADA = ("NVIDIA RTX 6000 Ada Generation", "8.9")


@pytest.mark.parametrize(
    ("words", "listed", "expected"),
    [
        (LLAMA, [A100], "the GPU, NVIDIA A100-SXM4-80GB, has compute capability 8.0; products in 8 bits need 8.9"),
        ([*LLAMA, "peft=none"], [A100], "use precision=bf16"),
        (LLAMA, [H100, A100], "NVIDIA A100-SXM4-80GB"),
        (["model=hf", "model.path=somebody/something"], [A100], "NVIDIA A100-SXM4-80GB"),
        (["model=qwen3_30b_a3b"], [ADA], "has compute capability 8.9; products of experts in 8 bits need 9 or 10"),
        (LLAMA, [ADA], None),
        (["model=qwen3_30b_a3b"], [H100], None),
        (LLAMA, [], None),  # not known; the run itself finds out
    ],
)
def test_a_gpu_without_products_in_8_bits_is_refused_before_the_start(words, listed, expected, driver):
    driver(*listed)
    cfg = compose([*words, "precision=fp8"])
    if expected is None:
        checks.check(cfg, max(1, len(listed)))
        return
    with pytest.raises(UserError) as error:
        checks.check(cfg, len(listed))
    assert expected in str(error.value)


def test_missing_value_is_named():
    cfg = compose()
    OmegaConf.update(cfg, "optimizer.lr", "???")
    with pytest.raises(UserError, match=r"`optimizer\.lr`: has no value"):
        checks.check(cfg, 0)


@pytest.mark.parametrize(
    "words, gpus, processes",
    [
        ([], 0, 1),
        ([], 4, 4),
        ([*LLAMA, "parallelism=tp2"], 0, 2),
        ([*LLAMA, "parallelism=tp2_pp2"], 0, 4),
        ([*LLAMA, "parallelism=tp2"], 8, 8),
        ([*LLAMA, "parallelism=fsdp"], 2, 2),
        ([*LLAMA, "parallelism=fsdp", "precision=fp8"], 2, 2),
        ([*LLAMA, "parallelism=fsdp", "peft=none"], 0, 1),
        ([*LLAMA, "parallelism=fsdp", "peft=none"], 2, 2),
        (["parallelism=single"], 8, 1),
        (["parallelism=pp2", "parallelism.pipeline_model_parallel_size=4"], 0, 4),  # 30 layers
        (["parallelism=pp2", "parallelism.pipeline_model_parallel_size=4", f"{LAST}=3"], 0, 4),
        ([*LLAMA, "parallelism=pp2", f"{VIRTUAL}=2", f"{FIRST}=14", f"{LAST}=18"], 0, 2),
        ([*LLAMA, "parallelism=pp2", f"{LAYOUT}='Et*17|t*15L'"], 0, 2),
        (["model=qwen3_30b_a3b", "parallelism=tp2", "parallelism.expert_model_parallel_size=4"], 0, 4),
        (["model=mixtral_8x7b", "peft=dora", "peft.target_modules=[linear_qkv,linear_proj]"], 0, 1),
        (["model=qwen3_30b_a3b", "parallelism=tp2", "parallelism.expert_model_parallel_size=8"], 8, 8),
    ],
)
def test_processes_per_node(words, gpus, processes):
    cfg = compose(words)
    checks.check(cfg, gpus)
    assert checks.nproc_per_node(cfg, gpus) == processes


GROUPS = [
    f"{group.name}={choice.stem}"
    for group in sorted(__import__("posttrain.config.composition", fromlist=["CONF_DIR"]).CONF_DIR.iterdir())
    if group.is_dir() and group.name not in ("hydra",)
    for choice in sorted(group.glob("*.yaml"))
]


@pytest.mark.parametrize("word", GROUPS)
def test_every_choice_composes_and_is_allowed(word):
    import posttrain.evaluate.settings  # noqa: F401  (registers the schema of its command)
    from posttrain.config import targets

    words = [word]
    if word.startswith("data=") and word != "data=demo":
        words.append("data.path=x.json")
    own = word.startswith("metric=")  # a group of one command
    cfg = compose(words, "evaluate" if own else "config")
    targets.check(cfg)
    checks.check_ranges(cfg)
    if not own:
        checks.check_keys(cfg)


def options(path):
    """(key, whether a comment on or above the line explains it, its parent key) for each option of a YAML file."""
    above, block, parents = False, None, {}
    for line in path.read_text().splitlines():
        text, indent = line.strip(), len(line) - len(line.lstrip())
        if block is not None and (not text or indent > block):
            continue
        block = None
        found = re.match(r"([\w.]+):(\s|$)", text)
        if not found:
            above = text.startswith("#") or (above and bool(text) and not text.startswith("-"))
            continue
        if re.search(r":\s*[|>]-?\s*(#.*)?$", text):
            block = indent
        parents = {depth: key for depth, key in parents.items() if depth < indent}
        is_mapping = not line.split("#")[0].strip().partition(":")[2].strip()
        if not is_mapping or "#" in line:
            yield found[1], above or "#" in line, parents.get(max(parents, default=-1))
        parents[indent] = found[1]


def test_every_option_has_a_comment():
    from posttrain.config.composition import CONF_DIR

    bare = []
    for group in [CONF_DIR, *sorted(p for p in CONF_DIR.iterdir() if p.is_dir())]:
        files = sorted(group.glob("*.yaml") if group == CONF_DIR else group.rglob("*.yaml"))
        listed = [(path, *option) for path in files for option in options(path)]
        # A choice may leave to its group's other files what they explain, and a mapping's comment covers what is in it.
        explained = {key for _, key, commented, _ in listed if commented} | {"_target_", "defaults", "format", "hydra"}
        bare += [
            f"{path.relative_to(CONF_DIR)}: {key}"
            for path, key, commented, parent in listed
            if not (commented or key in explained or parent in explained - {"format"}) and path.stem != key
        ]
    assert not bare, "\n".join(bare)


@pytest.mark.parametrize("words", [["peft=dora"], ["trainer.cuda_graph=true", "trainer.recompute=none"]])
def test_the_model_s_config_is_read_once(words, tmp_path, monkeypatch):
    architecture = OmegaConf.to_container(compose(LLAMA).model.architecture)
    (tmp_path / "config.json").write_text(json.dumps(architecture))
    gpu = checks.patches.Platform("cuda", transformer_engine=True)  # without one no step is captured
    monkeypatch.setattr(checks.patches.Platform, "with_gpus", lambda visible: gpu)
    reads = []
    monkeypatch.setattr(model_checks, "read_json", lambda path: reads.append(path) or read_json(path))
    checks.check(compose([*LLAMA, f"model.path={tmp_path}", *words]), 1)
    assert reads == [tmp_path / "config.json"]


def test_a_command_checks_once(tmp_path, monkeypatch, capsys):
    """Ahead of Hydra's directory and again in the task: one set of objects, one note on the terminal."""
    from posttrain.__main__ import settle

    monkeypatch.setenv("POSTTRAIN_TRUST_REMOTE_CODE", "1")
    words = ["model.trust_remote_code=true", "parallelism=auto"]
    first, second = settle(compose(words), 0), settle(compose(words), 0)
    assert first is second and first.line.startswith("parallelism=auto: on a CPU, 1 process")
    assert capsys.readouterr().err.count("runs with your rights") == 1
    assert settle(compose([*words, "seed=1"]), 0) is not first


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (["adapter/adapter_config.json", "checkpoints/iter_0000002/x"], "its result is model.path={}/adapter"),
        (["hf/config.json"], "its result is model.path={}/hf"),
        (["checkpoints/iter_0000002/x"], "python -m posttrain.convert export {} DIR, then model.path=DIR"),
        (["iter_0000002/x"], "python -m posttrain.convert export {} DIR, then model.path=DIR"),
    ],
)
def test_a_run_as_a_model_names_what_is_meant(tmp_path, files, said):
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match=re.escape(said.format(tmp_path))):
        checks.check(compose(["model=hf", f"model.path={tmp_path}"]), 0)


def test_a_template_that_would_have_no_effect_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("a document")
    words = ["objective=text", f"data.path={tmp_path}"]
    checks.check(compose(words), 0)
    with pytest.raises(UserError, match="`template=chatml`: has no effect with this objective"):
        checks.check(compose([*words, "template=chatml"]), 0)
