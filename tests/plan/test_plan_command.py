"""`python -m posttrain.plan`: numbers, tables, mistakes."""

import json
import math
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace

import pytest

from posttrain.config.composition import compose
from posttrain.errors import UserError
from posttrain.plan import advice
from posttrain.plan.__main__ import estimate, main, plan
from posttrain.plan.display import print_plan
from posttrain.plan.memory import GIB, estimate_memory
from posttrain.plan.speed import EXPERT_LINK, LINK, estimate_speed, exchange_seconds, sum_seconds
from posttrain.spec import checks
from posttrain.spec.resolve import resolve_spec
from posttrain.utils import gpus

GPU = gpus.find_gpu("h100")


def planned(capsys, *words):
    fits = plan(compose([*words, "plan.json=true"], config_name="plan"))
    found = json.loads(capsys.readouterr().out)
    assert fits == found["fits"]
    return found


def test_a_ready_run_is_planned_without_a_file(capsys):
    found = planned(capsys, "experiment=lora_llama32_1b", "plan.gpu=4090")
    assert found["data"] == {"not_counted": "no data.path= is given"} and found["fits"] and found["steps"] is None


def test_default_run_without_torch():
    command = [sys.executable, "-X", "importtime", "-m", "posttrain.plan", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stderr
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "hydra" in imported and not {"torch", "megatron.core", "megatron.bridge"} & imported
    found = json.loads(done.stdout)
    assert found["parameters"]["model"] == 134_515_008 and found["parameters"]["trainable"] == 30 * 16 * 8448
    assert found["data"]["conversations"] == 2400 and found["steps"] == 10
    assert 0.4 < found["data"]["supervised_tokens"] / found["data"]["tokens"] < 0.5
    assert found["fits"] and found["memory_gib"]["peak"] == pytest.approx(
        sum(found["memory_gib"]["parts"].values()), abs=0.01
    )


def test_steps_and_tokens(capsys, tmp_path):
    from test_preview import byte_tokenizer

    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    rows = [{"instruction": "x" * 50, "output": "y" * 99}] * 40
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    words = [
        "model=llama32_1b", f"model.tokenizer={tmp_path / 'tokenizer'}", "data=alpaca", f"cache_dir={tmp_path}",
        f"data.path={tmp_path / 'rows.json'}", "trainer.seq_length=512", "trainer.global_batch_size=4",
    ]  # fmt: skip
    found = planned(capsys, *words, "trainer.epochs=3")
    data = found["data"]
    assert data["conversations"] == data["read"] == 40
    assert data["rows"] == math.ceil(40 / (512 // (data["tokens"] // 40)))
    per_epoch = math.ceil(data["rows"] / 4)
    assert found["steps"] == 3 * per_epoch
    assert (found["epoch"]["steps"], found["epoch"]["passes"]) == (per_epoch, 3)
    assert found["epoch"]["last_batch"] == data["rows"] - 4 * (per_epoch - 1)
    assert found["tokens"] == 3 * data["tokens"]
    assert found["tokens_per_step"] == round(data["tokens"] / data["rows"] * 4)
    assert data["supervised_tokens"] == 40 * 100  # the answer and its end
    same = planned(capsys, *words, "trainer.epochs=3", "data.validation_fraction=0.5")
    assert same["data"]["rows"] == data["rows"]  # all conversations are the same, so none is held out
    unpacked = planned(capsys, *words, "data.packing=false")
    assert unpacked["data"]["rows"] == 40 and unpacked["memory_gib"]["peak"] < found["memory_gib"]["peak"]


def test_data_that_cannot_be_counted(capsys, tmp_path):
    (tmp_path / "rows.json").write_text('[{"instruction": "a", "output": "b"}]')
    words = ["model=llama3_8b", "data=alpaca", f"data.path={tmp_path / 'rows.json'}", "model.path=nobody/nothing"]
    found = planned(capsys, *words)
    assert "nobody/nothing" in found["data"]["not_counted"] and found["steps"] is None
    assert planned(capsys, *words, "trainer.max_steps=7")["steps"] == 7


def test_tables(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    words = ["model=llama3_8b", "peft=none", "plan.read_data=false", "plan.gpu=h100"]
    assert not plan(compose(words, config_name="plan"))
    out = capsys.readouterr().out
    for text in ("8,030,261,248 trained", "does not fit", "cheapest change that fits", "optimizer", "outside"):
        assert text in out
    lines = out.splitlines()
    assert lines[2].startswith("does not fit: needs ") and lines[3].startswith("cheapest change that fits: add ")


def test_what_the_plan_does_not_count_is_said(capsys):
    words = ["model=llama3_8b", "plan.read_data=false", "plan.gpu=h100", "trainer.recompute=selective"]
    assert planned(capsys, *words)["settings_not_counted"] == []
    keys = ["trainer.megatron.model.recompute_modules", "trainer.megatron.optimizer.optimizer_cpu_offload"]
    words += [f"+{keys[0]}=[mlp]", f"+{keys[1]}=true", "+trainer.megatron.model.distribute_saved_activations=false"]
    assert planned(capsys, *words)["settings_not_counted"] == keys
    plan(compose(words, config_name="plan"))
    assert f"not counted in memory and time: {', '.join(keys)}" in " ".join(capsys.readouterr().out.split())


def test_the_verdict_comes_first_and_overrides_stay_whole(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    words = ["model=llama31_70b", "plan.read_data=false", "plan.gpu=h100", "plan.gpus=8", "parallelism=tp8"]
    result = estimate(compose([*words, "trainer.max_steps=2"], config_name="plan"), [], None)
    print_plan(result)
    out = capsys.readouterr().out
    third = out.splitlines()[2]
    assert re.fullmatch(r"fits: [\d.]+ of 79\.2 GiB; [\d.]+ s a step, \d+ s in all", third)
    overrides = [override for layout in result["layouts"] for override in layout["overrides"]]
    assert any(len(override) > 40 for override in overrides) and all(override in out for override in overrides)


def test_no_column_is_cut_off_in_eighty_characters(capsys, monkeypatch):
    """The last one is narrower there, and overrides are whole as far as half of it."""
    monkeypatch.setenv("COLUMNS", "80")
    words = ["model=qwen3_32b", "peft=none", "parallelism=auto", "plan.gpu=h200", "plan.gpus=4", "plan.read_data=false"]
    words.append("trainer.seq_length=4096")
    print_plan(estimate(compose(words, config_name="plan"), [], None))
    table = capsys.readouterr().out.partition("One change")[2].partition("Memory per GPU")[0]
    rows = [line for line in table.splitlines() if line.startswith("│")]
    assert rows and all(line.endswith("│") and len(line) <= 80 for line in rows)
    for text in ("parallelism.tensor_model_parallel_size=8", "sequences", "different", "training"):
        assert text in table


@pytest.mark.parametrize(
    ("more", "line"),
    [
        ([], "; parallel: pipeline 4, layers of the stages 9+9+10+2\n"),
        (
            ["+trainer.megatron.model.num_layers_in_last_pipeline_stage=3"],
            "; parallel: pipeline 4, layers of the stages 9+9+9+3\n",
        ),
    ],
)
def test_the_layers_of_the_stages_are_said(more, line, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    words = ["model=smollm2_135m", "plan.read_data=false", "plan.gpu=h100", "plan.gpus=4", "parallelism=pp2"]
    words.append("parallelism.pipeline_model_parallel_size=4")
    plan(compose([*words, *more], config_name="plan"))
    assert line in capsys.readouterr().out


AGAIN = ["trainer.recompute=full"]


@pytest.mark.parametrize(
    "words, expected",
    [
        (["plan.gpu=h1000"], "not known; did you mean h100"),
        (["plan.gpus=0"], "must be (greater than 0|at least 1)"),
        (["plan.memory_gib=-1"], "must be (greater than 0|at least 1)"),
        (["plan.gpu=a100", "precision=fp8"], "`precision=fp8`: the GPU, A100, has compute capability 8.0"),
        (["plan.gpu=a6000", "model=llama3_8b", "precision=fp8", "peft=none"], "A6000, has compute capability 8.6"),
        (["plan.gpu=l40s", "model=qwen3_30b_a3b", "precision=fp8"], "products of experts in 8 bits need 9 or 10"),
        (
            ["model=llama3_8b", "trainer.offload_layers=33", "parallelism=auto"],
            "`trainer.offload_layers=33`: the model",
        ),
        (
            ["model=llama3_8b", "plan.gpus=4", *AGAIN, "trainer.recompute_layers=33", "parallelism=auto"],
            "`trainer.recompute_layers=33`: the model has 32 layers; set 1 to 32",
        ),
        (
            ["model=llama3_8b", "plan.gpus=2", *AGAIN, "trainer.recompute_layers=20", "parallelism=pp2"],
            "no pipeline stage has more than 17",
        ),
        (["optimizer.lr=-1"], "`optimizer.lr=-1.0`: must be greater than 0"),
        (["model=llama3_8b", "parallelism=tp8", "parallelism.tensor_model_parallel_size=16", "plan.gpus=16"], "groups"),
    ],
)
def test_mistakes(words, expected):
    with pytest.raises(UserError, match=expected):
        plan(compose([*words, "plan.read_data=false"], config_name="plan"))


def test_gpus_of_a_listing():
    listing = (
        "0, GPU-aa, NVIDIA H200, 143771, 9.0\n1, GPU-bb, NVIDIA L4, 23034, [N/A]\n2, GPU-cc, Some New One, 1024, 12.0\n"
    )
    names = lambda visible: [gpu.name for gpu in gpus.parse_listing(listing, visible)]  # noqa: E731
    assert names(None) == ["NVIDIA H200", "NVIDIA L4", "Some New One"]
    assert names("1,0") == names("GPU-bb,GPU-a") == ["NVIDIA L4", "NVIDIA H200"] and names("") == []
    first, second, third = gpus.parse_listing(listing, None)
    assert (first.tflops, second.tflops, third.tflops) == (989, 121, None)
    assert (first.capability, second.capability, third.capability) == ((9, 0), (8, 9), (12, 0))
    assert (first.eight_bit, second.eight_bit, third.eight_bit) == (True, False, True)
    assert first.memory_gib == pytest.approx(139.9, abs=0.1) and gpus.find_gpu("4090").name == "RTX 4090"


@pytest.fixture
def mixed(tmp_path, monkeypatch):
    """A machine with two kinds of GPUs, the larger and newer one first."""
    script = tmp_path / "nvidia-smi"
    lines = "0, GPU-a, NVIDIA H100 80GB HBM3, 81559, 9.0\n1, GPU-b, NVIDIA A100-SXM4-40GB, 40960, 8.0"
    script.write_text(f"#!/bin/sh\ncat <<END\n{lines}\nEND\n", encoding="utf-8")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    gpus._query_gpus.cache_clear()
    yield
    gpus._query_gpus.cache_clear()


@pytest.mark.usefixtures("mixed")
def test_a_run_on_gpus_of_two_kinds_is_planned_for_the_smaller(typed, monkeypatch, capsys):
    """It has to fit there; and what one of them can't do is refused, as by the run."""
    words = ["model=llama3_8b", "plan.read_data=false"]
    gpu = typed(*words)["gpu"]
    assert gpu["name"] == "NVIDIA A100-SXM4-40GB" and gpu["count"] == 2
    assert gpu["memory_gib"] == 39.5
    monkeypatch.setattr(sys, "argv", ["plan", *words, "precision=fp8"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2 and "the GPU, NVIDIA A100-SXM4-40GB, has compute" in capsys.readouterr().err


def test_advice_fits_and_is_the_cheapest():
    s = resolve_spec(compose(["model=llama3_8b", "trainer.seq_length=4096", "trainer.micro_batch_size=4"]), 1)
    small = replace(GPU, memory_gib=44)
    best = advice.cheapest(s, small)
    assert best.fits(small) and best.kind == "speed" and best.memory.needed <= 44 * GIB
    fitting = [c for n in (1, 2, 3) for c in advice.changes(s, small, n) if c.fits(small)]
    assert all(best.slower <= change.slower for change in fitting if change.kind == "speed")
    assert advice.cheapest(s, replace(GPU, memory_gib=1)) is None
    for change in advice.changes(s, GPU, 2):
        assert change.setting.shape.heads % change.setting.tensor == 0
        assert change.setting.global_batch % (change.setting.micro_batch * change.setting.data_parallel) == 0


@pytest.mark.parametrize(
    "words",
    [
        ["model=llama3_8b", "peft=none"],
        ["model=llama3_8b", "trainer.seq_length=4096", "trainer.micro_batch_size=4"],
        ["model=llama3_8b", "peft=none", "parallelism=ddp", "parallelism.nproc_per_node=4"],
        ["model=llama3_8b", "parallelism=fsdp", "parallelism.nproc_per_node=4"],
        ["model=gemma2_9b", "peft=dora"],
        ["model=llama3_8b", "peft=none", "optimizer=adam_bf16"],
        ["model=llama3_8b", "trainer.recompute=full", "trainer.recompute_layers=4"],
    ],
)
def test_an_estimated_change_is_what_its_overrides_make(words):
    """Memory and time of each are those of the configuration that its overrides compose, and it is allowed."""
    s = resolve_spec(compose(words), 4 if "parallelism.nproc_per_node=4" in words else 1)
    before = estimate_speed(s, GPU, s.global_batch * s.length)
    for change in (*advice.changes(s, GPU), *advice.changes(s, GPU, 2)[::6]):
        world = change.setting.world
        cfg = compose([*words, *change.overrides, f"parallelism.nproc_per_node={world}"])
        checks.check_parallelism(cfg, world, None)
        planned = resolve_spec(cfg, world)
        planned.check()
        after = estimate_speed(planned, GPU, planned.global_batch * planned.length)
        assert estimate_memory(planned).needed == pytest.approx(change.memory.needed), change.overrides
        assert before.tokens_per_second / after.tokens_per_second == pytest.approx(change.slower), change.overrides


@pytest.mark.parametrize(
    ("words", "overrides"),
    [
        (["model=qwen3_32b", "peft=none", "plan.gpu=h200", "plan.gpus=4", "parallelism=auto"], ["optimizer=adam_bf16"]),
        (["model=llama3_8b", "peft=none", "plan.gpu=h200"], ["optimizer=adam_bf16"]),
        # Two GPUs are needed either way, and then Adam's moments need no rounding.
        (["model=llama3_8b", "peft=none", "plan.gpu=h100"], ["trainer.recompute=full", "parallelism=tp2"]),
        (["model=llama3_8b", "peft=none", "plan.gpu=h200", "optimizer.adam_beta2=0.999"], ["parallelism=tp2"]),
    ],
)
def test_a_smaller_state_is_advised_where_it_saves_gpus(typed, words, overrides):
    """And the table says of the advised change what the line above it says."""
    found = typed(*words, "plan.read_data=false", "trainer.seq_length=4096")
    best = found["cheapest_change"]
    assert best["overrides"] == overrides
    rows = [change for change in found["changes"] if change["overrides"] == overrides]
    assert all(row["needed_gib"] == best["needed_gib"] and row["time"] == best["time"] for row in rows)


def test_a_smaller_state_is_of_all_weights():
    for words in (["peft=lora"], ["peft=none", "optimizer=sgd"], ["peft=none", "precision=fp32"]):
        s = resolve_spec(compose(["model=llama3_8b", *words]), 1)
        for change in (*advice.changes(s, GPU), *advice.changes(s, GPU, 2)):
            assert "optimizer=adam_bf16" not in change.overrides


@pytest.fixture
def typed(monkeypatch, capsys):
    """The plan of a command line, by the command itself in this process."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["plan", *map(str, words), "--json"])
        with pytest.raises(SystemExit):
            main()
        return json.loads(capsys.readouterr().out)

    return run


@pytest.mark.parametrize(
    "words",
    [
        ["model=llama31_70b", "plan.gpu=h100", "plan.gpus=1"],
        ["model=llama3_8b", "peft=none", "plan.gpu=h100", "trainer.seq_length=4096"],
        ["model=llama3_8b", "plan.gpu=4090", "plan.memory_gib=19", "trainer.seq_length=2048", "DATA"],
    ],
)
def test_the_cheapest_change_is_what_planning_it_gives(typed, tmp_path, words):
    if "DATA" in words:
        from test_preview import byte_tokenizer

        byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
        rows = [{"instruction": "x" * (40 + i % 7), "output": "y" * (20 * (i % 11) + 9)} for i in range(300)]
        (tmp_path / "rows.json").write_text(json.dumps(rows))
        words = [
            *words[:-1], "data=alpaca", f"data.path={tmp_path / 'rows.json'}", f"cache_dir={tmp_path}",
            f"model.tokenizer={tmp_path / 'tokenizer'}",
        ]  # fmt: skip
    before = typed(*words)
    best = before["cheapest_change"]
    words = [word for word in words if not word.startswith("plan.gpus=")]
    after = typed(*words, *best["overrides"], f"plan.gpus={best['gpus']}")
    assert after["fits"] and not before["fits"]
    assert best["needed_gib"] == after["memory_gib"]["needed"]
    ratio = before["speed"]["tokens_per_second"] / after["speed"]["tokens_per_second"]
    assert best["time"] == round(ratio, 2)


def test_more_layers_than_were_asked_for_may_be_computed_again(typed):
    words = ["model=llama3_8b", "plan.gpu=l4", "plan.memory_gib=26", *AGAIN, "trainer.recompute_layers=2"]
    given = typed(*words)
    assert not given["fits"]
    assert ["trainer.recompute_layers=null"] in [layout["overrides"] for layout in given["layouts"]]
    changes = {tuple(change["overrides"]): change for change in given["changes"]}
    assert changes["trainer.recompute_layers=null",]["fits"]
    assert typed(*words, "trainer.recompute_layers=null")["fits"]


def test_a_different_training_is_not_changed_further_than_it_has_to_be(typed):
    """LoRA alone fits; shorter sequences or 8 bits beside it would save time, and are not what was asked."""
    best = typed("model=llama3_70b", "peft=none", "plan.gpu=a100", "plan.gpus=4", "parallelism=tp4")["cheapest_change"]
    assert best["overrides"] == ["peft=lora"]
    s = resolve_spec(compose(["model=llama3_8b", "peft=none", "trainer.seq_length=4096"]), 1)
    fitting = advice.fitting(s, replace(GPU, memory_gib=40))
    different = next(change for change in fitting if change.kind == "result")
    assert different.overrides == ("peft=lora",)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["parallelism=tp2", "plan.gpus=3"], "(3 processes: plan.gpus=3); plan.gpus=2 would do"),
        (["parallelism=tp8", "plan.gpus=1"], "(1 process: plan.gpus=1); plan.gpus=8 would do"),
        (["parallelism.nproc_per_node=8", "plan.gpus=4"], "parallelism.nproc_per_node=8; plan.gpus=8 has one for each"),
        (["trainer.micro_batch_size=3"], "sizes in parallelism need); trainer.global_batch_size=33 would do"),
    ],
)
def test_numbers_of_gpus_that_contradict_each_other_say_what_to_type(words, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["plan", "model=llama3_8b", "plan.gpu=h100", *words])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2 and said in capsys.readouterr().err


def test_a_file_or_a_run_is_planned_as_what_it_stands_for(typed, tmp_path):
    """Not with the demo's rows, and with changes that are planned in full."""
    words = ["model=llama3_70b", "peft=none", "plan.gpu=h100", "plan.gpus=8", "parallelism=tp8"]
    file = tmp_path / "my.yaml"
    file.write_text("".join(f"{word.replace('=', ': ')}\n" for word in words))
    run = tmp_path / "run" / ".hydra"
    run.mkdir(parents=True)
    (run / "overrides.yaml").write_text(json.dumps([word for word in words if not word.startswith("plan.")]))
    expected = typed(*words)
    assert expected["cheapest_change"] and expected["tokens_per_step"] == 32 * 4096
    assert typed(file) == expected
    assert typed("--rerun", run.parent, *words[2:4]) == expected


def test_an_option_that_is_none_says_how_settings_are_written(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["plan", "--gpu", "h100"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert "--gpu: no such option; settings are written KEY=VALUE" in capsys.readouterr().err


def test_a_gpu_that_is_not_known_is_planned_with_its_memory(typed, monkeypatch, capsys):
    found = typed("model=llama3_8b", "plan.gpu=v100", "plan.memory_gib=32", "plan.read_data=false")
    assert found["gpu"]["name"] == "v100" and found["fits"] and found["speed"]["step_s"] is None
    assert found["memory_gib"] == typed("model=llama3_8b", "plan.gpu=a100", "plan.read_data=false")["memory_gib"]
    monkeypatch.setattr(sys, "argv", ["plan", "model=llama3_8b", "plan.gpu=v100"])
    with pytest.raises(SystemExit):
        main()
    assert "or give plan.memory_gib as well" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("NVIDIA H200", "H200"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("h100 nvl", "H100 NVL"),
    ],
)
def test_a_gpu_may_be_called_as_its_driver_calls_it(name, kind):
    assert gpus.find_gpu(name) == gpus.find_gpu(kind) and gpus.find_gpu(name).name == kind


@pytest.mark.parametrize("name", ["NVIDIA A100-SXM4-40GB", "4xh200", "NVIDIA H200 80GB"])
def test_a_gpu_of_another_size_or_several_are_not_taken_for_one(name):
    with pytest.raises(UserError, match="not known"):
        gpus.find_gpu(name)


def test_gpus_that_are_left_idle_are_said(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "250")
    words = ["model=llama3_8b", "plan.gpu=h100", "plan.gpus=4", "plan.read_data=false"]
    assert plan(compose([*words, "parallelism=single"], "plan"))
    assert "1 x H100 (3 more of each machine idle: parallelism.nproc_per_node=1)" in capsys.readouterr().out
    assert plan(compose(words, "plan"))
    assert "idle" not in capsys.readouterr().out


def test_a_reader_that_has_seen_enough_is_no_run_that_does_not_fit():
    """Exit code 1 says that; a reader that goes ends a command as SIGPIPE does."""
    command = [sys.executable, "-m", "posttrain.plan", "model=llama3_8b", "plan.gpu=h100", "plan.read_data=false"]
    pipe, end = os.pipe()
    os.close(pipe)
    with os.fdopen(end, "wb") as gone:
        done = subprocess.run(command, stdout=gone, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


def test_a_model_without_data_is_not_planned_with_the_demos_rows(typed):
    large = typed("model=llama31_70b", "plan.gpu=h100")
    assert large["tokens_per_step"] == 32 * 4096 and large["steps"] is None
    assert "trainer.seq_length=4096 trainer.global_batch_size=32" in large["data"]["not_counted"]
    short = typed("model=gpt2", "plan.gpu=h100", "trainer.global_batch_size=4", "trainer.max_steps=7")
    assert short["tokens_per_step"] == 4 * 1024 and short["steps"] == 7  # of GPT-2's learned positions
    sizes = ("trainer.global_batch_size=4", "trainer.micro_batch_size=1", "trainer.seq_length=512")
    given = typed("model=llama31_70b", "plan.gpu=h100", *sizes)
    assert given["data"]["not_counted"] == "no data= is given (data=demo plans the demo)"  # nothing is put in its place
    demo = typed("model=llama31_70b", "plan.gpu=h100", "data=demo", "plan.read_data=false")
    assert demo["tokens_per_step"] == 8 * 256 and demo["steps"] == 10


def test_a_plan_is_of_one_run(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["plan", "model=llama3_8b", "-m", "peft.rank=8,16"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2 and "--multirun: sweeps over trainings alone" in capsys.readouterr().err


def test_eight_bits_are_advised_where_there_are_some():
    s = resolve_spec(compose(["model=llama3_8b", "trainer.seq_length=4096"]), 1)
    words = {kind: [c.overrides for c in advice.changes(s, gpus.find_gpu(kind))] for kind in ("h100", "a100")}
    assert ("precision=fp8",) in words["h100"] and ("precision=fp8",) not in words["a100"]
    small = replace(GPU, memory_gib=17)
    best = advice.cheapest(s, small)
    assert "precision=fp8" in best.overrides and best.setting.eight_bit_base and best.fits(small)
    full = resolve_spec(compose(["model=llama3_8b", "peft=none"]), 1)
    assert not any("precision=fp8" in change.overrides and change.setting.adapters is None
                   for n in (1, 2) for change in advice.changes(full, GPU, n))  # fmt: skip


def test_time():
    s = resolve_spec(compose(["model=llama32_1b", "trainer.seq_length=4096", "trainer.global_batch_size=4"]), 1)
    s = replace(s, squares=200.0)  # conversations are short
    h200 = gpus.find_gpu("h200")
    # Measured before an MLP and its LoRA were one operation, which is as much faster on full rows.
    measured = 90_560 * 75_351 / 71_964
    assert estimate_speed(s, h200, 4 * 4096).tokens_per_second == pytest.approx(measured, rel=0.1)
    full = replace(s, adapters=None)
    assert estimate_speed(full, h200, 4 * 4096).tokens_per_second == pytest.approx(64_390, rel=0.1)
    plain = estimate_speed(replace(s, graph=False), h200, 4 * 4096)
    assert plain.bound == "kernel launches" and plain.tokens_per_second == pytest.approx(40_670, rel=0.1)
    again = estimate_speed(replace(s, recompute="full"), h200, 4 * 4096)
    assert again.step_s > 1.3 * estimate_speed(s, h200, 4 * 4096).step_s
    assert estimate_speed(s, gpus.Gpu("new", None, 80), 1).step_s is None


def test_mixtures_wait_for_the_host_unless_their_experts_are_grouped():
    h200 = gpus.find_gpu("h200")
    words = ["model=qwen3_30b_a3b", "trainer.seq_length=4096", "trainer.global_batch_size=2"]
    waiting, grouped = (
        estimate_speed(resolve_spec(compose([*words, *more]), 1), h200, 2 * 4096)
        for more in (["+trainer.megatron.model.moe_permute_fusion=true"], [])
    )
    assert waiting.tokens_per_second == pytest.approx(3_106, rel=0.05)  # measured
    assert waiting.bound == "kernel launches" and grouped.bound == "arithmetic"
    assert grouped.tokens_per_second > 3 * waiting.tokens_per_second


def test_exchanges_are_slower_where_the_gpus_are():
    """By the data sheets: an A100's NVLink is two thirds of an H200's, PCIe 4 a fourteenth, and nothing overlaps."""
    words = ["model=llama3_8b", "trainer.seq_length=4096", "parallelism=fsdp", "trainer.global_batch_size=4"]
    kinds = [gpus.find_gpu(name) for name in ("h200", "a100", "4090")]
    h200, a100, rtx = (exchange_seconds(resolve_spec(compose(words), 2), kind) for kind in kinds)
    assert a100 == pytest.approx(1.5 * h200) and rtx == pytest.approx(900 / 64 * h200)
    words[2] = "parallelism=tp2"
    spec = resolve_spec(compose([*words, "peft=lora"]), 2, True)
    assert spec.overlapped_exchanges
    apart = replace(spec, overlap=False)
    assert exchange_seconds(spec, kinds[2]) == exchange_seconds(apart, kinds[2])
    assert exchange_seconds(apart, kinds[2]) == pytest.approx(900 / 64 * exchange_seconds(apart, kinds[0]))
    assert exchange_seconds(spec, gpus.Gpu("new", None, 80)) == exchange_seconds(spec, kinds[0])


def test_sums_of_all_weights_gradients_are_counted():
    """Of bf16 weights 8 bytes are passed on; with a divided state 6, beside products where these take longer."""
    words = ["model=llama32_1b", "peft=none", "trainer.seq_length=4096", "trainer.global_batch_size=8"]
    h200, rtx = gpus.find_gpu("h200"), gpus.find_gpu("4090")
    whole = resolve_spec(compose([*words, "parallelism=ddp"]), 2, True)
    divided = replace(whole, distributed_optimizer=True)
    weights = whole.known_shape.parameters
    assert sum_seconds(whole, h200, 1.0) == pytest.approx(8 * weights / LINK)
    assert sum_seconds(whole, rtx, 1.0) == pytest.approx(900 / 64 * 8 * weights / LINK)
    assert sum_seconds(divided, h200, 1.0) == 0
    assert sum_seconds(replace(divided, overlap=False), h200, 1.0) == pytest.approx(6 * weights / LINK)
    assert whole.micro_batches == 4
    assert sum_seconds(divided, rtx, 0.4) == pytest.approx(900 / 64 * 6 * weights / LINK - 0.1)
    lora = resolve_spec(compose([*words, "parallelism=ddp", "peft=lora"]), 2, True)
    assert sum_seconds(lora, rtx, 1.0) == 0
    slower = estimate_speed(whole, rtx, 8 * 4096).step_s - estimate_speed(divided, rtx, 8 * 4096).step_s
    assert slower > 0


def test_exchanges_of_expert_parallelism_are_counted():
    """Each layer gathers or sums four times what the group's tokens are; Megatron sends eight copies of each."""
    words = ["model=qwen3_30b_a3b", "trainer.seq_length=4096", "parallelism=ddp", "trainer.global_batch_size=4"]
    upstream = ["+trainer.megatron.model.moe_permute_fusion=true"]
    layer = 4 * 4096 * 2048 * 2 / EXPERT_LINK  # of one process's tokens
    h200 = gpus.find_gpu("h200")
    for size, more, times in ((1, [], 0), (2, [], 2), (4, [], 4), (2, upstream, 8)):
        divided = [f"parallelism.expert_model_parallel_size={size}", "trainer.recompute=none", *more]
        s = resolve_spec(compose([*words, *divided]), 4)
        assert exchange_seconds(s, h200) == pytest.approx(48 * times * layer)
        again = replace(s, recompute="full")
        assert exchange_seconds(again, h200) == pytest.approx(1.5 * exchange_seconds(s, h200))
    whole, divided, waiting = (
        estimate_speed(resolve_spec(compose([*words, *more]), 4), h200, 4 * 4096).tokens_per_second
        for more in ([], ["parallelism=ep2"], ["parallelism=ep2", *upstream])
    )
    assert whole > divided > 3 * waiting


def test_a_captured_step_is_planned_where_there_is_no_gpu(capsys):
    """The GPU of the plan is another machine's, with Transformer Engine."""
    words = ["model=llama32_1b", "plan.gpu=h200", "plan.read_data=false", "trainer.cuda_graph=true"]
    assert planned(capsys, *words)["fits"]
    with pytest.raises(UserError, match=r"a step can't be captured: data\.packing=false"):
        planned(capsys, *words, "data.packing=false")
