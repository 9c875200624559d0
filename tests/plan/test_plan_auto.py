"""`parallelism=auto`: what it chooses for given GPUs, and that every choice can be run."""

import itertools
import json
import re
from dataclasses import replace

import pytest
from omegaconf import OmegaConf, open_dict

from posttrain.__main__ import settle
from posttrain.config.composition import CONF_DIR, compose
from posttrain.errors import UserError
from posttrain.launch import launcher
from posttrain.patches import Platform
from posttrain.plan import auto, layouts
from posttrain.plan.__main__ import estimate, plan
from posttrain.plan.display import print_plan
from posttrain.plan.memory import GIB, estimate_memory
from posttrain.plan.report import build_plan
from posttrain.plan.speed import estimate_speed, with_rate
from posttrain.plan.typed_settings import TypedSettings
from posttrain.spec import checks
from posttrain.spec.resolve import resolve_spec
from posttrain.sweep.job import set_launch
from posttrain.sweep.local import shares
from posttrain.sweep.slurm import check_run, options_of
from posttrain.sweep.trial import Trial
from posttrain.utils.gpus import Gpu, find_gpu


@pytest.fixture(autouse=True)
def rows(tmp_path, monkeypatch):
    """A data file for the configurations to name."""
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    monkeypatch.chdir(tmp_path)


def composed(*words):
    return compose(["data=prompt_completion", "data.path=rows.jsonl", "trainer.seq_length=4096", *words])


def sizes(cfg):
    p = cfg.parallelism
    return {
        "tp": p.tensor_model_parallel_size, "pp": p.pipeline_model_parallel_size, "cp": p.context_parallel_size,
        "ep": p.expert_model_parallel_size, "zero1": p.distributed_optimizer, "local": p.nproc_per_node,
        "recompute": cfg.trainer.recompute,
    }  # fmt: skip


PLAIN = {"tp": 1, "pp": 1, "cp": 1, "ep": 1, "zero1": False, "recompute": "none"}


@pytest.mark.parametrize(
    "words, gpus, gib, expected",
    [
        (["model=llama32_1b"], 8, 79.2, {"local": 8}),
        (["model=llama3_8b"], 1, 79.2, {"local": 1}),
        (["model=llama3_8b"], 2, 23.5, {"pp": 2, "local": 2}),
        (["model=llama3_8b", "peft=none"], 8, 139.8, {"zero1": True, "local": 8}),
        (["model=llama3_8b", "peft=none"], 8, 70, {"pp": 2, "zero1": True, "local": 8}),
        (["model=llama31_70b"], 8, 79.2, {"tp": 2, "pp": 2, "local": 8}),
        (["model=mixtral_8x7b"], 8, 79.2, {"pp": 2, "local": 8}),
        # nothing fits on two with all activations kept
        (["model=llama31_70b"], 2, 79.2, {"tp": 2, "local": 2, "recompute": "full"}),
        (["model=llama31_70b", "trainer.recompute=selective"], 4, 79.2,
         {"tp": 2, "pp": 2, "local": 4, "recompute": "selective"}),
        (["model=qwen25_0b5", "trainer.micro_batch_size=8"], 4, 79.2, {"local": 4}),
        # nine heads: no TP of 2; a pipeline keeps as many activations; a few layers again are faster than parts of rows
        (["trainer.seq_length=8192", "trainer.micro_batch_size=8", "trainer.recompute=none"], 2, 24,
         {"cp": 2, "local": 2}),
        (["trainer.seq_length=8192", "trainer.micro_batch_size=8"], 2, 24, {"local": 2, "recompute": "full"}),
        # one sequence of 128 k tokens on eight GPUs
        (["model=llama3_8b", "trainer.seq_length=131072", "trainer.global_batch_size=4", "trainer.recompute=none"], 8,
         139.8, {"tp": 4, "local": 8}),
        # a batch of 8 can't be divided by 3: one GPU is left out
        (["trainer.global_batch_size=8"], 3, 79.2, {"local": 2}),
    ],
)  # fmt: skip
def test_choices(words, gpus, gib, expected):
    cfg = composed("parallelism=auto", *words)
    line = auto.resolve(cfg, gpus, gib, True)
    checks.check(cfg, gpus)
    assert sizes(cfg) == {**PLAIN, **expected}
    assert not cfg.parallelism.auto and line.startswith("parallelism=auto: ") and f"of {gib:.1f} GiB" in line
    assert estimate_memory(resolve_spec(cfg, expected["local"])).needed <= gib * GIB


def keeps_all(setting) -> bool:
    """Whether no activations are computed again or wait in the host's memory."""
    return setting.recompute == "none" and setting.offload_layers is None


def test_activations_in_the_hosts_memory_are_chosen_where_they_are_faster_than_a_division():
    """70B in 8 bits, rows of 8,192: whole on each GPU and 42 of 80 layers' away, rather than over two GPUs."""
    words = ["model=llama3_70b", "precision=fp8", "trainer.seq_length=8192", "parallelism=auto"]
    choice = auto.choose(composed(*words), 2, find_gpu("h200"), True)
    assert choice.setting.data_parallel == 2 and choice.setting.offload_layers
    assert choice.without is not None
    sizes_without, slower = choice.without
    assert sizes_without == "tensor 2" and slower == pytest.approx(1.09, abs=0.03)
    line = choice.describe(139.8)
    assert f"since tensor 2 without takes {slower:.2f} times the time" in line


def test_a_recompute_that_is_given_is_kept():
    """70B on two GPUs fits with activations computed again alone, which `none` forbids, to `plan` as well."""
    words = ["parallelism=auto", "model=llama31_70b"]
    with pytest.raises(UserError, match=r"does not fit on 2 GPUs .*; it would with trainer\.recompute=full"):
        auto.resolve(composed(*words, "trainer.recompute=none"), 2, 79.2, True)
    for given in ("auto", "none", "full"):
        cfg = composed(*words, f"trainer.recompute={given}")
        auto.resolve(cfg, 8, 79.2, True)
        assert sizes(cfg)["recompute"] == {"auto": "none"}.get(given, given)
    words += ["plan.gpu=h100", "plan.gpus=2", "plan.read_data=false", "trainer.seq_length=4096"]
    for layout in ([], ["parallelism=tp2"]):
        plans = {}
        for given in ("auto", "none"):
            overrides = [*words, *layout, f"trainer.recompute={given}"]
            plans[given] = estimate(compose(overrides, "plan"), overrides, None)
        saving = [one for one in plans["auto"]["layouts"] if "_layers=" in " ".join(one["overrides"])]
        assert plans["auto"]["fits"] == (not layout) and len(saving) == (1 if layout else 0)
        assert not plans["none"]["fits"]
        assert all("precision=fp8" in one["overrides"] for one in plans["none"]["layouts"])


@pytest.mark.parametrize(
    "words, world, kind",
    [
        (["model=llama3_8b", "peft=none"], 8, "h100"),
        (["model=llama31_70b"], 8, "h100"),
        (["model=llama31_70b"], 2, "h100"),
        (["model=mixtral_8x7b"], 4, "h200"),
    ],
)
def test_it_is_the_fastest_that_plan_lists(words, world, kind):
    """Of those with the same arithmetic, with activations kept where that is as fast but for what a start costs."""
    gpu = find_gpu(kind)
    cfg = composed("parallelism=auto", *words)
    choice = auto.choose(cfg, world, gpu, True)
    plain = composed("trainer.global_batch_size=32", *words)
    given = resolve_spec(plain, world, True)
    listed = layouts.fitting(
        plain, given, gpu, given.global_batch * given.length, TypedSettings(chosen_micro_batch=True)
    )
    listed = [layout for layout in listed if not layout.eight_bit]
    keeping = [layout for layout in listed if keeps_all(layout.setting)]
    first = listed[0]
    if keeping and auto.WORTH * keeping[0].step_s <= first.step_s:
        first = keeping[0]
    assert choice.setting.recompute == first.setting.recompute and choice.saves == (not keeps_all(first.setting))
    assert (choice.without is not None) == (choice.saves and bool(keeping))
    tokens = given.global_batch * given.length
    assert estimate_speed(choice.setting, gpu, tokens).step_s == pytest.approx(first.step_s)


def test_larger_micro_batches_are_listed_beside_tensor_parallelism():
    """Measured on four H200s: 10,821 tok/s a GPU with one row of 4,096 at a time, 12,632 with two."""
    words = ["model=llama3_8b", "parallelism=tp4", "trainer.seq_length=4096", "trainer.global_batch_size=8"]
    gpu = find_gpu("h200")
    cfg = composed(*words, "trainer.micro_batch_size=1")
    given = resolve_spec(cfg, 4, True)
    listed = layouts.fitting(cfg, given, gpu, 8 * 4096)
    times = {layout.overrides: layout.step_s for layout in listed}
    faster = times[()] / times["trainer.micro_batch_size=2",]
    assert faster == pytest.approx(12_632 / 10_821, rel=0.05)
    for layout in listed:
        assert layout.setting.tensor > 1 or layout.setting.micro_batch == 1
        rows = layout.setting.micro_batch * layout.setting.data_parallel
        assert 8 % rows == 0
    whole = composed(*words, "trainer.micro_batch_size=8")
    listed = layouts.fitting(whole, resolve_spec(whole, 4, True), gpu, 8 * 4096)
    assert {layout.setting.micro_batch for layout in listed} == {8}


@pytest.mark.parametrize("model", ["smollm2_135m", "gemma2_9b", "qwen3_30b_a3b", "gpt2_xl", "pythia_12b"])
def test_every_choice_passes_the_checks_and_is_the_same_again(model):
    plain = composed("parallelism=auto", f"model={model}", "trainer.seq_length=1024", "trainer.global_batch_size=24")
    for gpus, gib in itertools.product((1, 3, 8), (15, 40, 80)):
        cfg, again = plain.copy(), plain.copy()
        try:
            line = auto.resolve(cfg, gpus, gib, True)
        except UserError as error:
            assert "does not fit" in str(error)
            continue
        checks.check(cfg, gpus)
        assert auto.resolve(again, gpus, gib, True) == line and again == cfg


ANSWERED = ["data.validation_fraction=0.1", "trainer.num_generations=2"]


@pytest.mark.parametrize(
    "words, gpus, gib",
    [
        (["model=llama3_8b"], 2, 23.5),
        (["model=llama3_8b", "peft=none", "trainer.recompute=none"], 8, 79.2),
        (["model=llama3_8b", "peft=none"], 3, 80),  # two of them are used, and layers computed again
    ],
)
def test_a_split_without_sample_answers_says_so_and_what_has_them(words, gpus, gib):
    cfg = composed("parallelism=auto", *words, *ANSWERED)
    line = auto.resolve(cfg, gpus, gib, True)
    made = resolve_spec(cfg, cfg.parallelism.nproc_per_node)
    assert made.pipeline > 1 and not made.sample_answers
    said = re.search(r"no sample answers \(trainer.num_generations=2\), since no process has all layers: (.*)", line)
    advice = re.fullmatch(r"(.*) has them, in (\d\.\d\d) times the time", said[1])
    other = resolve_spec(composed(*words, *ANSWERED, *advice[1].split()), made.world)
    assert other.sample_answers and estimate_memory(other).needed <= gib * GIB
    gpu, tokens = with_rate(Gpu("here", None, gib)), made.global_batch * made.length
    slower = estimate_speed(other, gpu, tokens).step_s / estimate_speed(made, gpu, tokens).step_s
    assert float(advice[2]) == pytest.approx(slower, abs=0.006)


def test_no_word_of_sample_answers_where_there_are_none_or_nothing_has_them():
    words = ["parallelism=auto", "model=llama3_8b"]
    for none in ([], ["data.validation_fraction=0.1", "trainer.num_generations=0"]):
        assert "sample answers" not in auto.resolve(composed(*words, *none), 2, 23.5, True)
    long = ["trainer.seq_length=8192", "trainer.micro_batch_size=8", "trainer.recompute=none"]
    line = auto.resolve(composed("parallelism=auto", *long, *ANSWERED), 2, 24, True)
    assert line.endswith("since no process has whole sequences: nor has any other split that fits")


def test_answers_during_training_are_a_reason_for_another_split():
    words = ["parallelism=auto", "model=llama3_8b", *ANSWERED, "trainer.generation_interval=5"]
    cfg = composed(*words)
    line = auto.resolve(cfg, 2, 23.5, True)
    assert sizes(cfg) == {**PLAIN, "tp": 2, "local": 2} and "sample answers" not in line
    checks.check(cfg, 2)
    with pytest.raises(UserError, match=r"`trainer.generation_interval=5`: needs all layers and whole sequences"):
        auto.resolve(composed(*words, "parallelism.pipeline_model_parallel_size=2"), 2, 79.2, True)


def test_why_less_is_not_possible():
    cfg = composed("parallelism=auto", "model=llama32_1b", "trainer.global_batch_size=12")
    line = auto.resolve(cfg, 8, 80, True)
    assert cfg.parallelism.pipeline_model_parallel_size == 2
    assert "a smaller split was rejected: `trainer.global_batch_size=12`: must be a multiple" in line


def test_sizes_that_are_given_are_the_least():
    cfg = composed("parallelism=auto", "model=llama3_8b", "parallelism.tensor_model_parallel_size=2")
    auto.resolve(cfg, 8, 139.8, True)
    assert cfg.parallelism.tensor_model_parallel_size == 2 and cfg.parallelism.nproc_per_node == 8
    fewer = composed("parallelism=auto", "model=llama3_8b", "parallelism.nproc_per_node=4")
    auto.resolve(fewer, 8, 139.8, True)
    assert fewer.parallelism.nproc_per_node == 4


def test_a_size_that_is_given_needs_no_power_of_two():
    """SmolLM2 135M has nine heads, three groups of keys and 30 layers."""
    for size in ("tensor", "pipeline"):
        cfg = composed("parallelism=auto", "trainer.seq_length=3072", f"parallelism.{size}_model_parallel_size=3")
        assert f"{size} 3" in auto.resolve(cfg, 3, 79.2, True)
        checks.check(cfg, 3)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["parallelism.expert_model_parallel_size=2"], "expert_model_parallel_size=2`: this model has no experts"),
        (["parallelism.tensor_model_parallel_size=32"], "4 processes can't be divided into groups"),
        (["parallelism.fsdp=true"], "nothing is left to choose; use parallelism=fsdp"),
    ],
)
def test_sizes_that_no_split_has(words, said):
    cfg = composed("parallelism=auto", "model=llama3_8b", *words)
    with pytest.raises(UserError, match=re.escape(said)):
        checks.check_settings(cfg, 4)
        auto.resolve(cfg, 4, 79.2, True)


def test_a_distributed_optimizer_that_is_given_is_kept_on_one_gpu():
    alone = composed("parallelism=auto", "parallelism.distributed_optimizer=true")
    auto.resolve(alone, 1, 79.2, True)
    assert sizes(alone) == {**PLAIN, "zero1": True, "local": 1}


@pytest.mark.parametrize(
    "words",
    [
        *([f"trainer.recompute={recompute}"] for recompute in ("auto", "none", "selective", "full")),
        ["precision=fp8"],
        ["precision=fp8", "peft.dropout=0.1"],  # Transformer Engine's
        ["precision=fp32"],
        ["parallelism=zero1"],  # of one process
        ["parallelism=tp2", "parallelism.pipeline_model_parallel_size=4"],  # slower than four others
        ["parallelism.pipeline_model_parallel_size=3", "model=smollm2_135m", "trainer.global_batch_size=12"],
    ],
)
def test_what_is_asked_for_is_listed_where_it_fits(words):
    cfg = composed("model=llama32_1b", *words)
    pipeline = cfg.parallelism.pipeline_model_parallel_size
    given = resolve_spec(cfg, {1: 1, 3: 3, 4: 16}[pipeline])
    listed = layouts.fitting(cfg, given, find_gpu("h200"), given.global_batch * given.length)
    assert () in [layout.overrides for layout in listed]


def test_refused_with_the_cheapest_change():
    words = ["parallelism=auto", "model=llama3_8b", "trainer.recompute=selective"]
    with pytest.raises(UserError, match=r"does not fit on 1 GPU of 23\.5 GiB: it needs .* it would with trainer\.rec"):
        auto.resolve(composed(*words), 1, 23.5, True)
    with pytest.raises(UserError, match=r"does not fit on 8 GPUs .*\(tensor 8, trainer\.recompute=full\)"):
        auto.resolve(composed("parallelism=auto", "model=llama31_405b"), 8, 79.2, True)
    with pytest.raises(UserError, match=r"`optimizer\.lr=-1\.0`: must be greater than 0"):
        settle(composed("parallelism=auto", "optimizer.lr=-1"), 8)
    with pytest.raises(UserError, match="not a target"):  # before anything is built
        settle(composed("parallelism=auto", "model._target_=os.system"), 8)


def test_memory_that_is_given_counts():
    cfg = composed("parallelism=auto", "model=llama3_8b", "parallelism.memory_gib=23.5")
    assert "of 23.5 GiB" in auto.resolve(cfg, 2, 139.8, True)


def test_on_a_cpu():
    cfg = composed("parallelism=auto")
    assert auto.resolve(cfg, 0) == "parallelism=auto: on a CPU, 1 process"
    assert sizes(cfg) == {**PLAIN, "local": 1, "recompute": "auto"} and not cfg.parallelism.auto
    two = composed("parallelism=auto", "parallelism.pipeline_model_parallel_size=2")
    assert auto.resolve(two, 0) == "parallelism=auto: on a CPU, 2 processes"
    assert auto.resolve(composed("parallelism=tp2"), 8) is None


def test_without_transformer_engine_no_context_parallelism():
    cfg = composed("parallelism=auto", "model=llama3_8b", "peft=none")
    auto.resolve(cfg, 8, 139.8, False)
    assert cfg.parallelism.context_parallel_size == 1 and cfg.parallelism.distributed_optimizer


def test_a_trial_with_its_share_of_the_gpus():
    share = shares(2, 8)[1]
    cfg = composed("parallelism=auto", "model=llama31_70b", "sweep.parallel=2")
    auto.resolve(cfg, len(share.gpus), 79.2, True)
    assert cfg.parallelism.nproc_per_node == 4 and cfg.parallelism.pipeline_model_parallel_size == 2


def test_a_finished_trial_is_found_again(tmp_path):
    cfg = composed("parallelism=auto", "model=llama3_8b")
    trial = Trial("a", tmp_path, cfg.copy())
    auto.resolve(cfg, 2, 23.5, True)
    launcher.prepare(cfg, tmp_path)
    (tmp_path / "status.json").write_text('{"state": "finished"}')
    frozen = OmegaConf.load(tmp_path / "config.yaml").parallelism
    assert frozen.pipeline_model_parallel_size == 2 and frozen.nproc_per_node == 2 and not frozen.auto
    assert trial.already_finished()
    with pytest.raises(UserError, match="made with other settings"):
        Trial("a", tmp_path, composed("parallelism=auto", "model=llama3_8b", "seed=5")).already_finished()


def test_what_the_machine_decided_makes_no_other_trial(tmp_path):
    words = ["parallelism=auto", "trainer.micro_batch_size=auto", "model=llama31_70b"]
    cfg = composed(*words)
    auto.resolve(cfg, 2, 79.2, True)
    assert sizes(cfg)["recompute"] == "full" and cfg.trainer.recompute_layers and cfg.trainer.micro_batch_size == 1
    launcher.prepare(cfg, tmp_path)
    (tmp_path / "status.json").write_text('{"state": "finished"}')
    assert Trial("a", tmp_path, composed(*words)).already_finished()
    for given, old in (("trainer.recompute=none", "full"), ("trainer.micro_batch_size=2", "1")):
        with pytest.raises(UserError, match=rf'made with other settings .*{given.partition("=")[0]}: "?{old}"? -> '):
            Trial("a", tmp_path, composed(*words, given)).already_finished()


def test_layers_that_the_machine_chose_to_offload_make_no_other_trial(tmp_path):
    words = ["parallelism=auto", *LONG_70B]
    cfg = composed(*words)
    auto.resolve(cfg, 1, 165.0, True)
    count = cfg.trainer.offload_layers
    assert count
    launcher.prepare(cfg, tmp_path)
    (tmp_path / "status.json").write_text('{"state": "finished"}')
    assert Trial("a", tmp_path, composed(*words)).already_finished()
    for given in (f"trainer.offload_layers={count + 1}", "trainer.recompute=none"):
        with pytest.raises(UserError, match=r"made with other settings \(trainer.offload_layers: "):
            Trial("a", tmp_path, composed(*words, given)).already_finished()


def test_slurm_jobs_are_checked_by_the_memory_that_is_given():
    words = ["model=llama3_8b", "parallelism=auto", "hydra.launcher.gpus_per_node=2"]

    def asked(*more):
        cfg = compose(["hydra/launcher=slurm", *words, *more, "data=prompt_completion", "data.path=rows.jsonl"],
                      with_hydra=True)  # fmt: skip
        options = options_of(cfg.hydra.launcher)
        with open_dict(cfg):
            del cfg["hydra"]
        return cfg, options

    check_run(*asked())  # the job's node will know
    check_run(*asked("parallelism.memory_gib=80"))
    check_run(*asked("parallelism.memory_gib=17", "trainer.recompute=none"))  # by Transformer Engine's layers
    with pytest.raises(UserError, match="does not fit on 2 GPUs of 8"):
        check_run(*asked("parallelism.memory_gib=8"))


def test_a_job_chooses_on_its_nodes_from_the_frozen_configuration(tmp_path):
    launcher.prepare(composed("parallelism=auto", "model=llama31_70b"), tmp_path)
    cfg = OmegaConf.load(tmp_path / "config.yaml")
    set_launch(cfg, {"SLURM_NNODES": "2", "SLURM_NODEID": "1", "SLURM_JOB_ID": "7"}, "first")
    assert auto.resolve(cfg, 8, 79.2, True).startswith("parallelism=auto: tensor 4, data 4: ")
    launcher.prepare(cfg, tmp_path)
    queued_again = OmegaConf.load(tmp_path / "config.yaml")
    assert auto.resolve(queued_again, 8, 79.2, True) is None
    assert queued_again.parallelism.tensor_model_parallel_size == 4 and queued_again.parallelism.nproc_per_node == 8


@pytest.mark.parametrize("name", sorted(file.stem for file in (CONF_DIR / "parallelism").glob("*.yaml")))
def test_every_group_can_be_planned(name, capsys):
    model = "mixtral_8x7b" if name.startswith("ep") else "llama3_8b"
    cfg = compose([f"parallelism={name}", f"model={model}", "plan.read_data=false", "plan.json=true", "plan.gpus=16",
                   "trainer.seq_length=512", "trainer.global_batch_size=32"],
                  config_name="plan")  # fmt: skip
    plan(cfg)
    found = json.loads(capsys.readouterr().out)
    assert found["memory_gib"]["needed"] > 1 and (found["auto"] is not None) == (name == "auto")
    layout = found["layout"]
    assert layout["tensor"] * layout["pipeline"] * layout["context"] * layout["data"] == found["gpu"]["count"]


@pytest.mark.parametrize(
    "words, gpus, gib, expected",
    [
        (["model=llama32_1b"], 1, 139.8, 32),
        (["model=llama32_1b"], 1, 23.5, 4),
        (["model=llama32_1b", "trainer.global_batch_size=12"], 2, 23.5, 3),
        (["model=llama3_8b"], 1, 31, 1),
        (["model=llama3_8b", "parallelism=auto"], 2, 23.5, 1),
        (["model=llama3_8b", "parallelism=auto"], 2, 79.2, 4),
        (["model=llama3_8b"], 1, 16, 1),  # fits not at all: the run says so
        (["model=llama32_1b"], 0, None, 1),
    ],
)
def test_micro_batches_that_fill_the_memory(words, gpus, gib, expected):
    cfg = composed("trainer.micro_batch_size=auto", *words)
    line = auto.resolve(cfg, gpus, gib, True)
    checks.check(cfg, gpus)
    t = cfg.trainer
    assert t.micro_batch_size == expected
    said = f"{expected}: needs" if gpus else "on a CPU, 1"
    assert f"trainer.micro_batch_size=auto: {said}" in line
    if gib:
        world = checks.world_size(cfg, gpus)
        assert expected == 1 or estimate_memory(resolve_spec(cfg, world)).needed <= gib * GIB
        mine = t.global_batch_size // resolve_spec(cfg, world).data_parallel
        more = next((size for size in range(expected + 1, mine + 1) if mine % size == 0), None)
        if more:
            t.micro_batch_size = more
            assert estimate_memory(resolve_spec(cfg, world)).needed > gib * GIB


@pytest.mark.parametrize(
    "value, said", [("many", "must be a whole number or auto"), ("1.5", "must be a whole"), ("0", "must be at least 1")]
)
def test_other_micro_batch_sizes(value, said):
    with pytest.raises(UserError, match=f"`trainer.micro_batch_size={value}`: {said}"):
        checks.check(composed(f"trainer.micro_batch_size={value}"), 0)


def test_a_batch_that_no_micro_batch_divides_is_advised_by_the_processes_alone():
    cfg = composed("model=llama32_1b", "trainer.micro_batch_size=auto", "trainer.global_batch_size=7")
    auto.resolve_on(cfg, 2, find_gpu("h100"), True)
    with pytest.raises(UserError, match=r"micro_batch_size x data-parallel size = 1 x 2 = 2") as error:
        checks.check_parallelism(cfg, 2, None, checks.process_count(cfg, 2))
    assert "trainer.global_batch_size=8 " in str(error.value)


def test_micro_batches_leave_room_in_the_hosts_memory():
    """Activations that wait there fill it before the GPU's."""
    words = ["model=llama3_8b", "trainer.offload_layers=32", "trainer.global_batch_size=64", "trainer.seq_length=4096"]
    sizes = []
    for host_gib in (None, 200.0):
        cfg = composed(*words)
        auto.fill_memory(cfg, 1, replace(find_gpu("h200"), host_gib=host_gib), True)
        sizes.append(cfg.trainer.micro_batch_size)
    most, fewer = sizes
    host = estimate_memory(resolve_spec(cfg, 1)).host / GIB
    assert fewer < most and host <= 160 < 2 * host


def test_activations_that_the_host_has_no_room_for_do_not_fit(capsys):
    """Also where trainer.offload_layers is given: for the plan, what it lists, and parallelism=auto."""
    words = ["model=llama3_8b", "trainer.offload_layers=32", "trainer.recompute=none", "trainer.micro_batch_size=4"]
    cfg = composed(*words)
    roomy = replace(find_gpu("h200"), host_gib=200.0)
    host = estimate_memory(resolve_spec(cfg, 1)).host / GIB
    small = replace(roomy, host_gib=host)  # of which a part is the system's
    asked, tight = (build_plan(cfg, 1, gpu, read_data=False) for gpu in (roomy, small))
    assert asked["fits"] and not tight["fits"]
    as_asked = [[layout["overrides"] for layout in plan["layouts"]].count([]) for plan in (asked, tight)]
    assert as_asked == [1, 0]
    assert tight["cheapest_change"]["fits"]
    tight["gpu"] |= {"assumed": False, "host_assumed": False, "on_each_machine": 1, "idle": 0}
    print_plan(tight | {"auto": None, "sizes_on_this_cpu": []})
    assert f"of the host's memory {host:.1f} GiB" in " ".join(capsys.readouterr().out.split())
    for gpu in (roomy, small):
        choice = auto.choose(composed(*words, "parallelism=auto"), 1, gpu, True)
        assert choice.memory.fits(gpu) == (gpu is roomy)
    assert f"{host:.1f} GiB of the host's memory" in auto._refusal(choice, small, TypedSettings())


@pytest.mark.parametrize("words", [[], ["data.packing=false"], ["peft=none", "trainer.global_batch_size=64"]])
def test_a_pipeline_has_the_fastest_micro_batches_that_fit(words):
    """Few large ones leave its stages waiting: 16 rows at once take 1.9 times as long as one by one."""
    gpu = find_gpu("h200")
    cfg = composed("model=llama3_8b", "parallelism=pp2", "trainer.global_batch_size=16", *words)
    times = {}
    for size in (1, 2, 4, 8, 16, 32, 64):
        if cfg.trainer.global_batch_size % size == 0:
            cfg.trainer.micro_batch_size = size
            spec = resolve_spec(cfg, 2)
            if estimate_memory(spec).needed <= gpu.memory_gib * GIB:
                times[size] = estimate_speed(spec, gpu, spec.global_batch * spec.length).step_s
    cfg.trainer.micro_batch_size = 1
    line = auto.fill_memory(cfg, 2, gpu, True)
    assert times[cfg.trainer.micro_batch_size] == min(times.values())
    assert max(times.values()) > min(times.values()) and "the fastest that fits in a pipeline" in line


@pytest.mark.parametrize("layout", ["pp2", "auto", "ddp", "tp2_pp2"])
def test_a_captured_step_that_is_asked_for_is_kept(layout, monkeypatch):
    """Stages exchange the shapes of micro-batches of several rows, which can't be captured."""
    monkeypatch.setattr(checks.patches.Platform, "with_gpus", lambda gpus: Platform("cuda", transformer_engine=True))
    words = ["model=llama3_8b", f"parallelism={layout}", "trainer.micro_batch_size=auto", "trainer.cuda_graph=true"]
    cfg = composed(*words)
    checks.check_settings(cfg, 4)
    auto.resolve(cfg, 4, 40, True)
    spec = resolve_spec(cfg, 4)
    spec.check()
    assert spec.cuda_graph and spec.micro_batch >= 1


def test_plan_says_how_many_fit(capsys):
    cfg = compose(
        ["data=prompt_completion", "data.path=rows.jsonl", "model=llama32_1b", "trainer.micro_batch_size=auto",
         "plan.gpu=4090", "plan.read_data=false", "plan.json=true"], config_name="plan",
    )  # fmt: skip
    assert plan(cfg)
    assert json.loads(capsys.readouterr().out)["auto"].startswith("trainer.micro_batch_size=auto: 4: needs")


@pytest.mark.parametrize(
    "words, world, gpu",
    [
        (["model=llama3_70b"], 2, "h100"),
        (["model=llama3_8b", "peft=none"], 8, "h100"),
        (["model=llama3_8b", "peft=none", "parallelism=tp2"], 4, "a100"),
        (["model=mixtral_8x7b"], 4, "h200"),
    ],
)
def test_what_fits_is_what_its_overrides_make(words, world, gpu):
    """Fastest first, each on the same GPUs with the memory and time that its overrides have."""
    cfg = compose([*words, "trainer.seq_length=4096", "trainer.global_batch_size=32", "data=messages"])
    given = resolve_spec(cfg, world)
    kind = find_gpu(gpu)
    found = layouts.fitting(cfg, given, kind, 32 * 4096)
    assert found and [layout.step_s for layout in found] == sorted(layout.step_s for layout in found)
    for layout in found:
        kept = [
            word for word in words if not (word.startswith("parallelism=") and "parallelism" in str(layout.overrides))
        ]
        sizes = ["trainer.seq_length=4096", "trainer.global_batch_size=32", "data=messages"]
        made = resolve_spec(compose([*kept, *sizes, *layout.overrides]), world)
        assert estimate_memory(made).needed == pytest.approx(layout.memory.needed)
        assert layout.memory.needed <= kind.memory_gib * GIB
        assert estimate_speed(made, kind, 32 * 4096).step_s == pytest.approx(layout.step_s)
        assert layout.eight_bit == (made.precision == "fp8") and (made.eight_bit_base or not layout.eight_bit)


@pytest.mark.parametrize(
    "more",
    [
        ["model=llama3_70b", "parallelism=auto"],
        ["model=llama3_8b", "trainer.offload_layers=8", "parallelism=auto"],
        ["model=llama3_8b", "trainer.offload_layers=8", "trainer.seq_length=32768", "parallelism=auto"],
        ["model=llama3_8b", "trainer.micro_batch_size=auto", "parallelism=auto"],
        ["model=llama3_8b", "trainer.micro_batch_size=auto"],
        ["model=llama3_8b", "trainer.micro_batch_size=auto", "parallelism=pp2"],
    ],
)
def test_what_is_listed_beside_a_choice_of_auto_is_what_its_overrides_make(more):
    """Typed beside what would choose again: so each names its split and its micro-batch size."""
    words = [*more, "plan.gpu=h100", "plan.gpus=2", "plan.read_data=false"]
    chosen = estimate(compose(words, "plan"), words, None)
    assert chosen["fits"] and [] in [layout["overrides"] for layout in chosen["layouts"]]
    for layout in chosen["layouts"]:
        made = estimate(compose([*words, *layout["overrides"]], "plan"), [*words, *layout["overrides"]], None)
        assert made["memory_gib"]["needed"] == pytest.approx(layout["needed_gib"], abs=0.02), layout
        assert made["speed"]["step_s"] == pytest.approx(layout["step_s"]), layout


@pytest.mark.parametrize(
    "words",
    [
        ["model=llama31_70b", "peft=dora", "plan.gpu=4090", "plan.gpus=4"],
        ["model=llama31_70b", "peft=none", "plan.gpu=h100", "plan.gpus=1"],
    ],
)
def test_a_change_beside_auto_fits_when_it_is_typed(words):
    """Another file of `parallelism` would take away `auto`, and with it what is computed again."""
    words = [*words, "parallelism=auto", "plan.read_data=false"]
    asked = estimate(compose(words, "plan"), words, None)
    changes = [change for change in [*asked["changes"], asked["cheapest_change"]] if change["fits"]]
    assert not asked["fits"] and changes
    for change in changes:
        typed = [*words, *change["overrides"], f"plan.gpus={change['gpus']}"]
        assert estimate(compose(typed, "plan"), typed, None)["fits"], change


def test_only_adams_state_is_divided():
    words = ["model=llama3_8b", "peft=none"]
    divided = []
    for optimizer in ("adam", "sgd"):
        cfg = composed("parallelism=auto", *words, f"optimizer={optimizer}")
        auto.resolve(cfg, 4, 139.8, True)
        checks.check(cfg, 4)
        divided.append(cfg.parallelism.distributed_optimizer)
    assert divided == [True, False]
    plain = resolve_spec(composed("parallelism=ddp", *words, "optimizer=sgd"), 4)
    for change in auto.advice.changes(plain, find_gpu("h100")):
        assert "parallelism.distributed_optimizer=true" not in change.overrides


def test_eight_bits_and_tensor_parallelism_come_before_computing_again():
    """70B on two GPUs of 80 GB: what divides the weights and keeps them in 8 bits needs no second forward pass."""
    cfg = compose(["model=llama3_70b", "trainer.seq_length=4096", "trainer.global_batch_size=32", "data=messages"])
    first, *_, last = layouts.fitting(cfg, resolve_spec(cfg, 2), find_gpu("h100"), 32 * 4096)
    assert first.overrides == ("parallelism=tp2", "precision=fp8")
    assert not keeps_all(last.setting) and not last.eight_bit


LONG_70B = ["model=llama31_70b", "precision=fp8", "trainer.seq_length=8192", "trainer.global_batch_size=2"]


def test_activations_go_to_the_host_where_that_is_faster():
    """No more layers' than have to; and where all are computed again and that isn't enough, what that keeps."""
    gpu, tokens = find_gpu("h200"), 2 * 8192
    cfg = compose([*LONG_70B, "data=messages"])
    given = resolve_spec(cfg, 1)
    first, *_ = layouts.fitting(cfg, given, gpu, tokens)
    count = first.setting.offload_layers
    assert first.overrides == (f"trainer.offload_layers={count}",)
    room = (1 - layouts.HEADROOM) * gpu.memory_gib * GIB
    assert first.memory.needed <= room < estimate_memory(replace(given, offload_layers=count - 1)).needed
    assert first.step_s == pytest.approx(estimate_speed(given, gpu, tokens).step_s)  # beside the products
    choice = auto.choose(composed("parallelism=auto", *LONG_70B), 1, gpu, True)
    assert choice.setting.offload_layers == count
    said = f"trainer.offload_layers={count} ({first.memory.host / GIB:.1f} GiB of the host's memory per GPU)"
    assert f"{said} since nothing fits without" in choice.describe(140)
    choice = auto.choose(composed("parallelism=auto", *LONG_70B, "trainer.recompute=full"), 1, find_gpu("h100"), True)
    assert choice.memory.needed > 79.2 * GIB  # as is asked for
    assert auto.advice.cheapest(choice.setting, find_gpu("h100")).overrides == ("trainer.offload_layers=80",)
    short = [*LONG_70B, "trainer.seq_length=4096"]
    choice = auto.choose(composed("parallelism=auto", *short), 1, find_gpu("h100"), True)
    assert choice.memory.needed < 79.2 * GIB
    assert choice.setting.recompute == "full" and choice.setting.offload_layers


@pytest.mark.parametrize(
    ("more", "offloads", "lines"),
    [
        ([], True, ["which may have 167.8, as is assumed: plan.host_memory_gib says what a machine has"]),  # 1.2 times
        (["plan.host_memory_gib=300"], True, ["which may have 240.0\n"]),
        (["plan.host_memory_gib=64"], False, ["trainer.recompute=full trainer.recompute_layers="]),
        (["plan.host_memory_gib=600", "plan.gpus=2"], True, ["on each machine), which may have 240.0 for each GPU\n"]),
        (["plan.host_memory_gib=100", "plan.gpus=2"], False, []),
    ],
)
def test_a_plan_for_other_machines_offloads_what_their_memory_has_room_for(more, offloads, lines, capsys, monkeypatch):
    """And says how much that is, of each GPU's part."""
    monkeypatch.setenv("COLUMNS", "250")
    words = [*LONG_70B, "parallelism=auto", "plan.gpu=h200", "plan.gpus=1", "plan.read_data=false"]
    cfg = compose([*words, *more], "plan")
    assert plan(cfg)
    out = capsys.readouterr().out
    assert bool(cfg.trainer.offload_layers) == offloads == ("of the host's memory" in out.partition("Memory per")[0])
    for line in lines:
        assert line in out
    if offloads:
        needed = float(re.search(r"\(([\d.]+) GiB of the host's memory per GPU\)", out)[1])
        assert f"of the host's memory {needed:.1f} GiB for each GPU's activations" in out
        local = cfg.parallelism.nproc_per_node
        total = re.search(r"\((\d+) on each machine\)", out)
        assert bool(total) == (local > 1)
        assert total is None or float(total[1]) == pytest.approx(needed * local, abs=1)


def test_the_host_has_no_room_as_is_said(capsys, monkeypatch):
    """What doesn't fit there is not said to fit, and what would is said with what it needs there."""
    monkeypatch.setenv("COLUMNS", "250")
    words = [*LONG_70B, "trainer.seq_length=4096", "trainer.offload_layers=80", "trainer.micro_batch_size=2"]
    words += ["plan.gpu=h200", "plan.gpus=1", "plan.read_data=false"]
    assert plan(compose(words, "plan"), words)
    assert "of the host's memory" in capsys.readouterr().out
    tight = [*words, "plan.host_memory_gib=50"]
    assert not plan(compose(tight, "plan"), tight)
    out = capsys.readouterr().out
    assert re.search(r"does not fit: .*; of the host's memory [\d.]+ GiB .* which may have 40\.0\n", out)
    change = re.search(r"cheapest change that fits: add (.*?)  [\d.]+ GiB and \d+ of the host's for each GPU", out)[1]
    assert plan(compose([*tight, *change.split()], "plan"))


def test_no_more_layers_are_computed_again_than_have_to_be():
    """70B in 8 bits with rows of 8,192 on one GPU of 141 GB: half of the layers, and faster than all."""
    words, tokens = LONG_70B, 2 * 8192
    gpu = replace(find_gpu("h200"), host_gib=64.0)  # has no room for activations
    cfg = compose([*words, "data=messages"])
    (layout,) = layouts.fitting(cfg, resolve_spec(cfg, 1), gpu, tokens)
    count = layout.setting.recompute_layers
    assert layout.overrides == ("trainer.recompute=full", f"trainer.recompute_layers={count}")
    room = (1 - layouts.HEADROOM) * gpu.memory_gib * GIB
    assert layout.memory.needed <= room
    assert estimate_memory(replace(layout.setting, recompute_layers=count - 1)).needed > room
    all_again = replace(layout.setting, recompute_layers=None)
    assert layout.step_s < 0.9 * estimate_speed(all_again, gpu, tokens).step_s
    choice = auto.choose(composed("parallelism=auto", *words), 1, gpu, True)
    assert choice.setting.recompute_layers == count
    assert f"trainer.recompute=full trainer.recompute_layers={count} since nothing fits without" in choice.describe(140)
