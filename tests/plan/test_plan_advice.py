"""What plan advises is what planning it gives: allowed, on as many GPUs, with that memory and time."""

import pytest

from posttrain.cli import command
from posttrain.plan.__main__ import estimate, plan_change


def plan(words, in_full=False):
    replan = (lambda change: plan_change(words, change)) if in_full else None
    return estimate(command.compose(words, "plan"), words, replan)


@pytest.mark.parametrize(
    "words",
    [
        # A size that is typed stays beside another file of `parallelism`.
        ["model=llama3_8b", "plan.gpu=h200", "plan.gpus=16", "parallelism.pipeline_model_parallel_size=2"],
        ["model=gemma2_9b", "plan.gpu=h200", "plan.gpus=8", "plan.memory_gib=24",
         "parallelism.tensor_model_parallel_size=2"],
        ["model=llama32_1b", "plan.gpu=h200", "plan.gpus=4", "parallelism.distributed_optimizer=false"],
        ["model=llama32_1b", "peft=none", "plan.gpu=h200", "plan.gpus=6", "trainer.global_batch_size=12",
         "parallelism=auto", "parallelism.pipeline_model_parallel_size=3"],
        # So does the number of processes.
        ["model=qwen3_0b6", "peft=none", "plan.gpu=a100", "parallelism.nproc_per_node=1"],
        ["model=gemma2_9b", "peft=none", "plan.gpu=a100", "plan.gpus=8", "parallelism=pp2",
         "parallelism.nproc_per_node=2"],
        # GPUs that can't be divided, and of those that auto leaves idle.
        ["model=mistral_7b_v01", "plan.gpu=h100", "plan.gpus=3", "trainer.global_batch_size=12"],
        ["model=llama31_70b", "plan.gpu=h200", "plan.gpus=3", "parallelism=auto", "trainer.global_batch_size=8"],
        # Two machines.
        ["model=gemma2_9b", "plan.gpu=4090", "plan.gpus=4", "launch.nnodes=2", "trainer.micro_batch_size=2"],
        ["model=llama31_70b", "peft=none", "plan.gpu=h100", "plan.gpus=4", "launch.nnodes=2", "parallelism=tp4"],
        # What is chosen automatically is chosen again.
        ["model=llama3_8b", "peft=none", "plan.gpu=4090", "plan.gpus=4", "parallelism=auto"],
        ["model=gpt2", "peft=dora", "plan.gpu=h200", "plan.gpus=2", "parallelism=zero1",
         "trainer.micro_batch_size=auto"],
        # As many GPUs as the sizes need, where no number is given.
        ["model=mistral_7b_v01", "plan.gpu=h200", "parallelism=pp2"],
        # Shorter sequences than the trainer's own, where no data are given.
        ["model=llama32_1b", "plan.gpu=h100", "plan.memory_gib=4.4", "parallelism=fsdp", "trainer.recompute=full",
         "precision=fp8"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_advice_is_what_typing_it_gives(words):
    words = [*words, "plan.read_data=false"]
    asked = plan(words, in_full=True)
    changes = asked["changes"]
    if asked["cheapest_change"]:
        changes = [*changes, asked["cheapest_change"]]
    machines = 2 if "launch.nnodes=2" in words else 1
    assert asked["layouts"] or changes
    assert asked["fits"] or asked["layouts"] or asked["cheapest_change"] or not any(c["fits"] for c in changes)
    for layout in asked["layouts"]:
        made = plan([*words, *layout["overrides"]])
        assert made["fits"] and made["gpu"]["count"] == asked["gpu"]["count"], layout
        assert made["memory_gib"]["needed"] == pytest.approx(layout["needed_gib"], rel=1e-3, abs=0.02), layout
        assert made["speed"]["step_s"] == pytest.approx(layout["step_s"], rel=0.01), layout
    for change in changes:
        typed = [*words, *change["overrides"]]
        if change["gpus"] != asked["gpu"]["count"]:
            typed.append(f"plan.gpus={change['gpus'] // machines}")
        made = plan(typed)
        assert made["fits"] == change["fits"] and made["gpu"]["count"] == change["gpus"], change
        assert made["memory_gib"]["needed"] == pytest.approx(change["needed_gib"], rel=1e-3, abs=0.02), change
        ratio = asked["speed"]["tokens_per_second"] / made["speed"]["tokens_per_second"]
        assert ratio == pytest.approx(change["time"], rel=0.02, abs=0.006), change


def test_sizes_in_an_experiment_are_beside_the_file_of_parallelism_too(tmp_path):
    folder = tmp_path / "experiment"
    folder.mkdir()
    (folder / "mine.yaml").write_text("# @package _global_\nparallelism:\n  tensor_model_parallel_size: 2\n")
    words = [f"hydra.searchpath=[file://{tmp_path}]", "experiment=mine", "model=llama3_8b", "plan.gpu=h200",
             "plan.gpus=4", "plan.read_data=false"]  # fmt: skip
    undivided = [layout for layout in plan(words)["layouts"] if "parallelism=zero1" in layout["overrides"]]
    assert undivided
    for layout in undivided:
        made = plan([*words, *layout["overrides"]])
        assert made["layout"] == {"tensor": 1, "pipeline": 1, "context": 1, "expert": 1, "data": 4}
        assert made["speed"]["step_s"] == pytest.approx(layout["step_s"])
