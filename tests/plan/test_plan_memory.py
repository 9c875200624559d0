"""Memory: measured peaks, and how the parts move with the settings."""

from dataclasses import replace

import pytest

from posttrain.config.composition import compose
from posttrain.plan.memory import GIB, estimate_memory, stage_memory
from posttrain.plan.speed import estimate_speed
from posttrain.spec.resolve import resolve_spec
from posttrain.utils.gpus import find_gpu

ONE_B, EIGHT_B = "model=llama32_1b", "model=llama3_8b"
PACKED = ["data=prompt_completion", "data.path=x", "trainer.seq_length=4096"]
# peak_memory_gib of summary.json on one H200 (bench/README.md): GSM8K packed to 4,096 tokens, of which at most two
# thirds are supervised in a row.
MEASURED = [
    ([ONE_B, "trainer.global_batch_size=4"], 6.5),
    ([ONE_B, "trainer.global_batch_size=4", "peft.recompute_norms=false"], 8.0),
    ([ONE_B, "trainer.global_batch_size=4", "trainer.micro_batch_size=4", "peft.recompute_norms=false"], 22.3),
    ([EIGHT_B, "trainer.global_batch_size=2"], 28.0),
    ([EIGHT_B, "trainer.global_batch_size=2", "peft.recompute_norms=false"], 33.5),
    ([EIGHT_B, "trainer.global_batch_size=2", "precision=fp8"], 21.5),
    ([ONE_B, "trainer.global_batch_size=4", "peft=none"], 27.7),
    ([ONE_B, "peft.fused=false", "trainer.skip_prompt_logits=false", "trainer.cuda_graph=false"], 10.2),
]


def setting(words, world=1, **more):
    return replace(resolve_spec(compose([*PACKED, *words]), world), **{"supervised_share": 0.66, **more})


@pytest.mark.parametrize("words, gib", MEASURED)
def test_measured_peaks(words, gib):
    assert estimate_memory(setting(words)).peak / GIB == pytest.approx(gib, rel=0.04)


OTHERS = [  # bench/memory.py: what is counted in the data, and the peak
    (["model=qwen25_0b5", "peft=none", "trainer.micro_batch_size=2"], {"supervised_share": 0.604}, 23.70),
    (["model=gemma_2b"], {"supervised_share": 0.604}, 11.84),
    (
        ["model=smollm2_135m", "precision=fp32", "data.packing=false", "trainer.micro_batch_size=4"],
        {"supervised_share": 584 / 1001, "length": 1001 / 4, "sequences": 4, "longest": 364},
        2.525,
    ),
    (
        ["model=pythia_1b", "peft=none", "trainer.seq_length=2048", "trainer.micro_batch_size=2"],
        {"supervised_share": 0.577},
        21.51,
    ),
    # Megatron's own experts; grouped products have not been measured.
    (["model=qwen3_30b_a3b", "+trainer.megatron.model.moe_permute_fusion=true"], {"supervised_share": 1.0}, 85.2),
]


@pytest.mark.parametrize("words, counted, gib", OTHERS)
def test_measured_peaks_of_other_families(words, counted, gib):
    assert estimate_memory(setting(words, **counted)).peak / GIB == pytest.approx(gib, rel=0.05)


def test_what_is_always_there():
    full = estimate_memory(setting([ONE_B, "peft=none"])).parts
    weights = 1_235_814_400
    assert full["weights"] == 2 * weights and full["gradients"] == 4 * weights and full["optimizer"] == 12 * weights
    fp32 = estimate_memory(setting([ONE_B, "peft=none", "precision=fp32"])).parts
    assert fp32["weights"] == 4 * weights and fp32["optimizer"] == 8 * weights
    sgd = estimate_memory(setting([ONE_B, "peft=none", "optimizer=sgd"])).parts
    assert sgd["optimizer"] == 8 * weights
    lora = estimate_memory(setting([ONE_B])).parts
    trained = setting([ONE_B]).adapters.parameters
    assert lora["weights"] == 2 * (weights + trained) and lora["gradients"] == 4 * trained


def test_parallel_sizes_divide():
    weights = 1_235_814_400
    one = estimate_memory(setting([ONE_B, "peft=none"]))
    zero = estimate_memory(setting([ONE_B, "peft=none", "parallelism=zero1"], 4))
    assert zero.parts["optimizer"] == one.parts["optimizer"] / 4 and zero.parts["weights"] == one.parts["weights"]
    fsdp = estimate_memory(setting([ONE_B, "peft=none", "parallelism=fsdp"], 8))
    matrix = 128_256 * 2048  # the embedding, whole, and its gradient on its way to the parts
    layer = (weights - matrix) / 16
    assert fsdp.parts["weights"] == pytest.approx(2 * (weights / 8 + 2 * layer + matrix), rel=1e-4)
    assert fsdp.parts["gradients"] == pytest.approx(4 * (weights / 8 + matrix), rel=1e-4)
    whole = estimate_memory(setting([EIGHT_B])).parts["weights"]
    half = estimate_memory(setting([EIGHT_B, "parallelism=tp2"], 2))
    assert half.parts["weights"] == pytest.approx(whole / 2, rel=0.01)
    stages = setting([EIGHT_B, "parallelism=pp2"], 2)
    assert sum(stage_memory(stages, i).parts["weights"] for i in (0, 1)) == pytest.approx(whole, rel=1e-4)
    context = estimate_memory(divided := setting([EIGHT_B, "parallelism=cp2"], 2))
    outputs = 32 * divided.tokens * 4096 * 2  # of attention, kept as it was computed and as it came back
    assert context.parts["activations"] == estimate_memory(setting([EIGHT_B])).parts["activations"] / 2 + outputs
    experts = ["model=mixtral_8x7b", "peft=none"]
    assert estimate_memory(setting([*experts, "parallelism=ep8"], 8)).parts["weights"] < 2 * 8e9


def test_megatron_fsdp_divides_weights_in_8_bits_before_they_are_read():
    words = ["model=llama3_70b", "precision=fp8"]
    whole = estimate_memory(setting(words)).parts["weights"]
    divided = estimate_memory(setting([*words, "parallelism=fsdp"], 8))
    ends = 2 * 2 * 128_256 * 8192
    scales = 80 * 4 * (8192 + 2 * 1024 + 8192 + 2 * 28_672 + 8192)
    layer = (whole - scales - ends) / 80
    # Half a billion pairs of numbers, one and a half layers, are gathered ahead.
    assert divided.parts["weights"] == pytest.approx((whole - scales) / 8 + scales + 3 * layer + ends, rel=1e-4)
    assert not any("before it is divided" in name for name in divided.parts)
    assert divided.parts["weights"] < 15 * GIB < whole / 4
    bf16 = estimate_memory(setting(["model=llama3_70b", "parallelism=fsdp"], 8))
    assert bf16.needed > 2 * 70e9  # read whole


def test_experts_are_whole_under_tensor_parallelism_and_half_in_8_bits():
    mixture = "model=mixtral_8x7b"
    whole = 2 * 32 * 8 * 3 * 4096 * 14336  # bytes of all experts
    weights = [
        estimate_memory(setting([mixture, *words], world)).parts["weights"]
        for words, world in (([], 1), (["parallelism=tp2"], 2), (["precision=fp8"], 1))
    ]
    one, divided, eight_bit = weights
    assert whole < divided < one
    assert eight_bit == pytest.approx(one / 2, rel=0.02)


def test_an_adapter_that_experts_share_is_whole_under_tensor_parallelism():
    words = ["model=mixtral_8x7b"]
    sizes = setting(words).adapters.sizes
    attention = 32 * (sizes["linear_qkv"][1] + sizes["linear_proj"][1])
    experts = 32 * 16 * (4096 + 2 * 14336 + 14336 + 4096)
    assert setting(words).adapters.parameters == attention + experts
    for layout, world in (("tp2", 2), ("ep8", 8)):
        divided = attention / (2 if layout == "tp2" else 1)
        found = estimate_memory(setting([*words, f"parallelism={layout}"], world))
        assert found.parts["gradients"] == 4 * (divided + experts)


def test_grouped_experts_keep_less_than_megatrons():
    words = ["model=qwen3_30b_a3b"]
    grouped = estimate_memory(setting(words)).parts["activations"]
    upstream = estimate_memory(setting([*words, "+trainer.megatron.model.moe_permute_fusion=true"])).parts[
        "activations"
    ]
    assert grouped < upstream / 2


@pytest.mark.parametrize(("model", "times"), [("qwen3_30b_a3b", [1, 2, 4]), ("mixtral_8x7b", [1, 2, 4])])
def test_processes_of_expert_parallelism_have_room_for_all_choices_of_their_group(model, times):
    """Of fewer experts' weights; a token's choices are 8 of 128, 2 of 8, so all of them can be on one process."""
    divided = []
    for size in times:
        words = [f"model={model}", "parallelism=ddp", f"parallelism.expert_model_parallel_size={size}"]
        divided.append(estimate_memory(setting(words, size)))
    for memory, factor in zip(divided, times, strict=True):
        for term in ("MLP first matrix", "rows of experts", "sums of MLP activations"):
            assert memory.detail["layer"][term] == factor * divided[0].detail["layer"][term]
        assert memory.detail["layer"]["layer input"] == divided[0].detail["layer"]["layer input"]
    weights = [memory.parts["weights"] for memory in divided]
    assert weights[0] > 1.9 * weights[1] > 3 * weights[2]


def test_sequence_parallelism_divides_what_tensor_parallelism_does_not():
    with_it, without = (
        estimate_memory(setting([EIGHT_B, "peft=none", "parallelism=tp4", f"parallelism.sequence_parallel={on}"], 4))
        for on in ("true", "false")
    )
    stream = with_it.detail["layer"]["layer input"]
    assert without.detail["layer"]["layer input"] == 4 * stream
    assert without.detail["layer"]["MLP activation"] == with_it.detail["layer"]["MLP activation"]
    assert without.peak > with_it.peak


def test_pipeline_stages():
    s = setting([EIGHT_B, "parallelism=tp4_pp4", "trainer.global_batch_size=16"], 16)
    first, last = stage_memory(s, 0), stage_memory(s, 3)
    # Four micro-batches are on their way, in eight layers and six; three in nine.
    assert first.parts["activations"] == pytest.approx(4 * 8 / 6 * last.parts["activations"])
    assert stage_memory(s, 1).parts["activations"] == pytest.approx(3 * 9 / 6 * last.parts["activations"])
    assert not first.detail["loss"] and last.detail["loss"]
    few = setting([EIGHT_B, "parallelism=pp2", "trainer.global_batch_size=1"], 2)
    first, last = stage_memory(few, 0), stage_memory(few, 1)
    assert first.parts["activations"] == pytest.approx(17 / 15 * last.parts["activations"])
    tied = setting([ONE_B, "parallelism=pp2"], 2)
    embedding = 2 * 128256 * 2048
    assert (
        sum(stage_memory(tied, i).parts["weights"] for i in (0, 1))
        == estimate_memory(setting([ONE_B])).parts["weights"] + embedding
    )


def test_stages_that_trainer_megatron_divides_are_planned_as_they_are():
    pipeline = [EIGHT_B, "parallelism=pp2", "parallelism.pipeline_model_parallel_size=4"]
    layout = "+trainer.megatron.model.pipeline_model_parallel_layout="
    s = setting([*pipeline, f"{layout}'Et*2|t*13|t*14|t*3L'"], 4)
    stages = [stage_memory(s, index) for index in range(4)]
    tokens = [stage.parts["activations"] for stage in stages]
    # Each keeps the activations of its layers, of as many micro-batches as there are stages from it on.
    assert tokens == pytest.approx([4 * 2 / 3 * tokens[3], 3 * 13 / 3 * tokens[3], 2 * 14 / 3 * tokens[3], tokens[3]])
    assert estimate_memory(s).needed == max(stage.needed for stage in stages) == stages[1].needed
    even = setting([*pipeline, f"{layout}'E(t*8|)*3t*8L'"], 4)
    assert estimate_memory(s).needed > estimate_memory(even).needed
    assert estimate_speed(s, find_gpu("h200"), 4096.0).step_s > estimate_speed(even, find_gpu("h200"), 4096.0).step_s


def test_the_fullest_stage_may_be_between_the_first_and_the_last():
    """All weights of a model whose embedding is smaller than the layer that stages between have more."""
    words = ["model=llama31_405b", "peft=none", "parallelism=pp2", "parallelism.pipeline_model_parallel_size=8"]
    words += ["trainer.global_batch_size=1", "trainer.micro_batch_size=1"]
    s = setting(words, 8)
    needed = [stage_memory(s, index).needed for index in range(8)]
    assert estimate_memory(s).needed == max(needed) > max(needed[0], needed[-1])


@pytest.mark.parametrize("field", ["attn_logit_softcapping=70", "head_dim=320", "attention_dropout=0.1"])
def test_soft_capped_scores_that_no_kernel_does_are_kept(field):
    words = ["model=gemma2_2b", "trainer.seq_length=4096", "trainer.micro_batch_size=1"]
    assert not estimate_memory(setting(words)).detail["layer"].get("attention scores")
    s = setting([*words, f"++model.architecture.{field}"])
    # Tanh and softmax in fp32, softmax in bf16, of the whole row.
    assert estimate_memory(s).detail["layer"]["attention scores"] == pytest.approx(8 * 4096**2 * 10)
    assert "every score is kept" in s.decisions()["kernels of soft-capped attention"].reason
    assert setting(words).decisions()["kernels of soft-capped attention"]


def test_recomputation_and_what_is_trained_change_activations():
    plain = estimate_memory(setting([ONE_B]))
    again = estimate_memory(setting([ONE_B, "trainer.recompute=full"]))
    assert again.parts["activations"] == 16 * plain.detail["layer"]["layer input"]
    assert again.peak < plain.peak - 2.8 * GIB
    some = estimate_memory(setting([ONE_B, "trainer.recompute=full", "trainer.recompute_layers=4"]))
    assert some.parts["activations"] == (3 * plain.parts["activations"] + again.parts["activations"]) / 4
    kept = estimate_memory(setting([ONE_B, "peft.recompute_norms=false"]))
    missing = {"norm before attention", "norm before MLP", "MLP activation"}
    assert kept.detail["layer"].keys() - plain.detail["layer"].keys() == missing
    few = estimate_memory(setting([ONE_B, "peft.target_modules=[q_proj,v_proj]"]))
    assert "MLP activation" not in few.detail["layer"] and "norm before attention" in few.detail["layer"]
    dora = estimate_memory(setting([ONE_B, "peft=dora"]))
    assert dora.parts["activations"] > 1.4 * kept.parts["activations"]


def test_other_families_keep_more():
    mistral, unfused = (
        estimate_memory(setting(["model=mistral_7b_v03", *more])) for more in ([], ["peft.fused=false"])
    )
    assert "MLP gate" not in mistral.detail["layer"] and "MLP gate" in unfused.detail["layer"]
    gemma = estimate_memory(setting(["model=gemma2_2b", "peft.recompute_norms=false"])).detail["layer"]
    assert {"MLP gate", "inputs of output norms"} <= gemma.keys()
    assert "inputs of query and key norms" in estimate_memory(setting(["model=qwen3_8b"])).detail["layer"]
    neox = estimate_memory(setting(["model=pythia_1b"])).detail["layer"]
    assert "MLP input" not in neox and neox["MLP first matrix"] == 4096 * 2 * 8192


def test_soft_capped_scores_are_kept_on_a_cpu():
    on_gpu = setting(["model=gemma2_9b"])
    on_cpu = estimate_memory(replace(on_gpu, device="cpu", transformer_engine=False)).detail["layer"]
    layer = estimate_memory(on_gpu).detail["layer"]
    assert "attention scores" not in layer and on_cpu["attention scores"] > 16 * 4096**2 * 8
    assert layer["query, key, value"] == 4096 * (16 + 2 * 8) * 256 * 2
    assert layer["softmax statistics"] == 4096 * 16 * 4


def test_a_step_with_soft_capped_scores_is_captured():
    assert setting(["model=gemma2_9b"]).cuda_graph


def test_logits():
    lora = estimate_memory(setting([ONE_B])).detail["loss"]["logits"]
    full = estimate_memory(setting([ONE_B, "peft=none"])).detail["loss"]["logits"]
    rows = round(0.66 * 4096)
    assert lora == 2048 * 128256 * 2  # one chunk of them
    assert full == rows * 128256 * 6
    assert (
        estimate_memory(setting([ONE_B, "trainer.skip_prompt_logits=false"])).detail["loss"]["logits"]
        == 4096 * 128256 * 6
    )
    divided = estimate_memory(setting([ONE_B, "parallelism=tp2"], 2)).detail["loss"]["logits"]
    assert divided == lora / 2
    divided = estimate_memory(setting([ONE_B, "parallelism=tp2", "peft=none"], 2)).detail["loss"]["logits"]
    assert divided == 4096 * 128256 / 2 * 6
