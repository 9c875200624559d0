"""spec.yaml: what a run's directory says about the run's decisions."""

import pytest
from omegaconf import OmegaConf

from posttrain.config.composition import compose
from posttrain.errors import UserError
from posttrain.launch import launcher
from posttrain.spec import checks
from posttrain.spec.record import specify
from posttrain.spec.resolve import resolve_spec


def spec_of(words, gpus):
    cfg = compose(words)
    return specify(cfg, gpus, checks.check(cfg, gpus))


def test_a_run_on_eight_gpus(tmp_path, capsys):
    """Llama 3 8B has 8,030,261,248 parameters; an adapter 8 x (inputs + outputs)."""
    words = ["model=llama3_8b", "peft=lora", "peft.rank=8", "parallelism.tensor_model_parallel_size=2"]
    words += ["peft.target_modules=[linear_qkv,linear_proj,linear_fc1,linear_fc2]"]
    words += ["trainer.seq_length=4096", "trainer.global_batch_size=32", "trainer.micro_batch_size=2"]
    launcher.record_spec(tmp_path, spec_of(words, 8))
    spec = OmegaConf.load(tmp_path / "spec.yaml")
    assert spec.model.parameters == 8_030_261_248
    per_layer = 8 * (4096 + 6144) + 8 * (4096 + 4096) + 8 * (4096 + 28672) + 8 * (14336 + 4096)
    assert spec.trained.kind == "LoRA" and spec.trained.parameters == 32 * per_layer
    assert spec.processes.world == 8 and spec.processes.data == 4
    assert spec.batch.micro_batches_per_step == 32 // (2 * 4)
    graph = spec.decisions["CUDA graph"]
    assert not graph.enabled and graph.reason
    assert f"CUDA graph: off, {graph.reason}\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, divided",
    [
        ([], False),
        (["parallelism=zero1"], True),
        (["optimizer=adam_bf16"], True),
    ],  # whose state Megatron always divides
)
def test_whether_the_optimizer_is_divided(words, divided, tmp_path):
    cfg = compose(["model=llama3_8b", "peft=none", *words])
    launcher.record_spec(tmp_path, resolve_spec(cfg, 2))
    assert OmegaConf.load(tmp_path / "spec.yaml").processes.distributed_optimizer == divided


def test_the_demo_on_a_cpu(tmp_path, capsys):
    launcher.record_spec(tmp_path, spec_of([], 0))
    spec = OmegaConf.load(tmp_path / "spec.yaml")
    assert spec.device == "cpu" and spec.precision == "fp32" and spec.processes.world == 1
    assert capsys.readouterr().out == ""  # its reasons are those of any CPU


def test_a_hub_id_has_no_specification_before_it_is_read(tmp_path):
    launcher.record_spec(tmp_path, spec_of([], 0))
    launcher.record_spec(tmp_path, spec_of(["model=hf", "model.path=someone/something"], 0))
    assert not (tmp_path / "spec.yaml").exists()


def test_no_layer_to_adapt_is_refused_before_a_gpu_is_used():
    with pytest.raises(UserError, match="no layer of this model has such a name"):
        spec_of(["model=llama3_8b", "peft=lora", "peft.target_modules=[decoder.layers.99.*.linear_qkv]"], 1)


@pytest.mark.parametrize(
    ("words", "gpus", "enabled", "reason"),
    [
        ([], 0, True, "the loaded model is compared with its files"),
        (["model=llama32_1b"], 1, True, "the loaded model is compared with its files"),
        (["model=llama3_8b"], 1, False, "it would take about 11 s"),
        (["model=llama3_8b", "trainer.verify_base=true"], 1, True, "the loaded model is compared with its files"),
        (["model=llama3_8b", "peft=none"], 1, True, "the loaded model is compared with its files"),
        (["trainer.verify_base=false"], 0, False, "trainer.verify_base=false"),
        (["trainer.verify=false"], 0, False, "trainer.verify=false"),
        (["trainer.export=false"], 0, False, "nothing is exported"),
        (["trainer.export=false", "trainer.verify_base=true"], 0, True, "the loaded model is compared with its files"),
    ],
)
def test_the_loaded_model_is_compared_where_that_takes_seconds(words, gpus, enabled, reason):
    decision = spec_of(words, gpus).base_check
    assert (bool(decision), decision.reason) == (enabled, reason)
