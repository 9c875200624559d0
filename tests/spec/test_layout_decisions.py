"""What a layout decides, with its reason."""

import itertools

import pytest

from posttrain.config.composition import compose
from posttrain.spec.resolve import resolve_spec
from posttrain.spec.stages import divide_layers

LLAMA = "model=llama3_8b"  # 8 key heads
NINE_HEADS = "model=smollm2_135m"  # 9, and 3 key heads


def spec(*overrides, world=2):
    return resolve_spec(compose(["trainer.seq_length=4096", *overrides]), world)


@pytest.mark.parametrize("layout", ["ddp", "zero1", "tp2", "pp2", "cp2"])
def test_a_step_of_several_gpus_is_captured(layout):
    assert spec(LLAMA, f"parallelism={layout}").cuda_graph


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ([NINE_HEADS, "parallelism=cp2"], "3 key heads can't be divided by 2"),
        ([LLAMA, "parallelism=fsdp"], "Megatron-FSDP"),
        ([LLAMA, "precision=fp32"], "in fp32"),
        (["model=mixtral_8x7b", "parallelism=ep2", "peft=none"], "how many tokens"),
    ],
)
def test_or_why_not(words, reason):
    decision = spec(*words).cuda_graph
    assert not decision and reason in decision.reason


@pytest.mark.parametrize(
    ("words", "exchanged", "one_shape"),
    [
        (["parallelism=pp2"], False, True),
        (["parallelism=pp2", "trainer.micro_batch_size=2"], True, False),
        (["parallelism=pp2", "data=messages", "data.path=x", "data.packing=false"], True, False),
        (["parallelism=tp2"], False, True),  # captured
        (["parallelism=tp2", "trainer.cuda_graph=false"], False, False),
    ],
)
def test_a_pipeline_has_one_shape_of_one_row_or_tells_shapes(words, exchanged, one_shape):
    pipeline = spec(LLAMA, *words)
    assert (pipeline.shapes_exchanged, pipeline.one_shape) == (exchanged, one_shape)
    assert not (pipeline.shapes_exchanged and pipeline.cuda_graph)


def test_context_parallelism_exchanges_heads_where_they_can_be_divided():
    assert spec(LLAMA, "parallelism=cp2").heads_exchanged
    tensor = "parallelism.tensor_model_parallel_size=8"
    assert not spec(LLAMA, "parallelism=cp2", tensor, world=16).heads_exchanged  # one key head is left
    assert not spec(LLAMA, "parallelism=tp2").heads_exchanged


def test_what_is_kept_of_an_adapter_that_is_divided():
    adapter = spec(LLAMA, "parallelism=tp2", "precision=fp8")
    assert adapter.eight_bit_base and adapter.supervised_logits_only
    assert not spec(LLAMA, "parallelism=tp2", "peft=none").supervised_logits_only
    fully_sharded = spec(LLAMA, "parallelism=fsdp", "precision=fp8")
    assert fully_sharded.eight_bit_base and fully_sharded.divided_before_read
    assert not adapter.divided_before_read and not spec(LLAMA, "parallelism=fsdp").divided_before_read


MIXTURE = "model=qwen3_30b_a3b"


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["precision=fp8"],
        ["parallelism=tp2"],
        ["parallelism=ep2"],
        ["parallelism=ep2", "precision=fp8"],
        ["parallelism=tp2", "parallelism.expert_model_parallel_size=2"],
        ["peft=dora", "peft.target_modules=[linear_qkv]"],
    ],
)
def test_frozen_experts_are_grouped_products_and_captured(words):
    mixture = spec(MIXTURE, *words)
    assert mixture.grouped_experts and mixture.cuda_graph
    assert bool(mixture.eight_bit_base) == ("precision=fp8" in words)
    assert "experts as grouped products" in mixture.decisions()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["parallelism=ep2", "data=messages", "data.path=x", "data.packing=false"], "data.packing=false"),
        (["peft=none"], "all weights"),
        (["precision=fp32"], "bf16"),
        (["peft.dropout=0.1"], "plain LoRA"),
        (["peft.fused=false"], "plain LoRA"),
        (["precision=fp8", "peft.target_modules=[linear_fc1]"], "not every linear layer"),
        (["+trainer.megatron.model.moe_expert_capacity_factor=1.0"], "trainer.megatron.model"),
    ],
)
def test_or_are_upstreams_and_not_captured(words, reason):
    mixture = spec(MIXTURE, *words)
    assert not mixture.grouped_experts and not mixture.cuda_graph and not mixture.eight_bit_base
    assert reason in mixture.grouped_experts.reason and reason in mixture.cuda_graph.reason


def test_processes_that_exchange_tokens_have_equally_many():
    """Also where the step is not captured, of a micro-batch of padding too."""
    divided = spec(MIXTURE, "parallelism=ep2", "trainer.cuda_graph=false")
    assert divided.grouped_experts and divided.one_shape
    assert not spec(MIXTURE, "parallelism=ddp", "trainer.cuda_graph=false").one_shape


@pytest.mark.parametrize(
    ("model", "size", "rows"),
    [
        (MIXTURE, 1, 8),  # of 128 experts a token visits 8
        (MIXTURE, 2, 16),
        ("model=mixtral_8x7b", 4, 8),  # 2 of 8
        ("model=mixtral_8x7b", 8, 8),  # one expert is here, which no token visits twice
        (LLAMA, 1, 0),
    ],
)
def test_rows_that_a_process_has_room_for(model, size, rows):
    """The most that the router can choose, of all processes' tokens."""
    words = [f"parallelism.expert_model_parallel_size={size}"] if size > 1 else []
    assert spec(model, "parallelism=ddp", *words, world=size).expert_rows == rows


def test_a_dense_model_has_no_such_decision():
    assert "experts as grouped products" not in spec(LLAMA).decisions()


@pytest.mark.parametrize(
    ("words", "world", "layers"),
    [
        ([LLAMA, "parallelism=pp2"], 2, [17, 15]),  # the output layer is 2.4 of 8B's layers
        ([LLAMA, "parallelism=pp2", "parallelism.pipeline_model_parallel_size=4"], 4, [8, 9, 9, 6]),
        (["model=llama3_70b", "parallelism=pp2"], 2, [41, 39]),  # 1.2 of 70B's
        (["model=llama3_70b", "parallelism=tp4_pp4"], 16, [20, 20, 21, 19]),
        ([NINE_HEADS, "parallelism=pp2"], 2, [19, 11]),  # 30 layers, and 8 that the output layer is
        ([NINE_HEADS, "parallelism=pp2", "parallelism.pipeline_model_parallel_size=4"], 4, [9, 9, 10, 2]),
        (
            ["model=qwen3_14b", "parallelism=pp2", "parallelism.pipeline_model_parallel_size=16"],
            16,
            [2] * 6 + [3] * 9 + [1],
        ),
        ([LLAMA, "parallelism=pp2", "+trainer.megatron.model.num_layers_in_last_pipeline_stage=12"], 2, [20, 12]),
        ([LLAMA, "parallelism=ddp"], 2, [32]),
    ],
)
def test_the_last_stage_has_fewer_layers_beside_the_output_layer(words, world, layers):
    """The least that the longest stage can have, unless trainer.megatron says otherwise."""
    assert list(spec(*words, world=world).stage_layers) == layers


@pytest.mark.parametrize("output_layer", [0.1, 0.4, 1.2, 2.4, 8.0])
@pytest.mark.parametrize(("layers", "stages"), [(2, 2), (5, 2), (7, 4), (9, 4), (12, 4), (5, 5)])
def test_no_division_has_a_shorter_longest_stage(layers, stages, output_layer):
    def longest(division):
        return max(*division[:-1], division[-1] + output_layer)

    numbers = range(1, layers + 1)
    every = [parts for parts in itertools.product(numbers, repeat=stages) if sum(parts) == layers]
    chosen = divide_layers(layers, stages, output_layer)
    assert chosen in every and longest(chosen) == min(map(longest, every))
    fastest = [parts for parts in every if longest(parts) == longest(chosen)]
    assert chosen[-1] == max(parts[-1] for parts in fastest)
    assert list(chosen[:-1]) == sorted(chosen[:-1]) and chosen[-2] - chosen[0] <= 1


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ([], ""),
        (["parallelism.overlap=false"], "parallelism.overlap=false"),
        (["parallelism.sequence_parallel=false"], "sequence_parallel"),
        (["peft=none"], "plain LoRA"),
        (["peft.dropout=0.1"], "plain LoRA"),
    ],
)
def test_exchanges_run_beside_products_of_lora(words, reason):
    decision = spec(LLAMA, "parallelism=tp2", *words).overlapped_exchanges
    assert bool(decision) == (not reason) and reason in decision.reason


def test_attention_that_is_not_the_usual_one_is_said():
    wide = spec("model=gemma_7b").decisions()["Transformer Engine's attention"]
    assert not wide and "wrong for heads of 256 features" in wide.reason
    capped = spec("model=gemma2_9b").decisions()["Transformer Engine's attention"]
    assert not capped and "soft-capped" in capped.reason
    assert "Transformer Engine's attention" not in spec(LLAMA).decisions()
