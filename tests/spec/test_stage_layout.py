"""Megatron's notation for the layers of pipeline stages is read as Megatron reads it, before a run begins."""

import pytest
import torch

from posttrain.config.composition import compose
from posttrain.errors import UserError
from posttrain.plan import auto
from posttrain.spec import checks
from posttrain.spec.stage_layout import read_layout
from posttrain.spec.stages import own_stages
from posttrain.utils.gpus import find_gpu

pytestmark = pytest.mark.filterwarnings("ignore::SyntaxWarning")

MODEL = "+trainer.megatron.model."
LAYOUT = f"{MODEL}pipeline_model_parallel_layout"
VIRTUAL = f"{MODEL}virtual_pipeline_model_parallel_size"
WORDS = ["model=llama3_8b", "parallelism=pp2"]  # 32 layers
LETTERS = {"embedding": "E", "decoder": "t", "mtp": "m", "loss": "L"}


@pytest.mark.parametrize(
    "text",
    [
        "Et*17|t*15L",
        "E,t*3|(tt|)*29,m|L",
        "E|(tt|t*3|)*2|*2t|L",
        "Et*0|t*12L",
        "E(t)*3|(tt)*2(|t)*2L",
        "|Et*2|",
        "",
    ],
)
def test_as_megatron_reads_it(text):
    upstream = pytest.importorskip("megatron.core.transformer.pipeline_parallel_layer_layout")
    parts = []
    for stage in upstream.PipelineParallelLayerLayout.parse_str_to_list(text):
        parts.append("".join(LETTERS[layer.name] for layer in stage))
    assert read_layout(text) == parts


@pytest.mark.parametrize("text", ["Et*2|x|L", "E(tt|tL", "Ett)|L", "E((t)*2|)*2L", "E(tt)L", "E t|L", "E*|L", "Et*|L"])
def test_what_megatron_does_not_read_is_refused(text):
    upstream = pytest.importorskip("megatron.core.transformer.pipeline_parallel_layer_layout")
    with pytest.raises(AssertionError):
        upstream.PipelineParallelLayerLayout.parse_str_to_list(text)
    with pytest.raises(ValueError, match="can't be read from"):
        read_layout(text)


def test_a_list_of_names():
    assert read_layout([["embedding", "decoder"], [], ["Decoder", "mtp", "loss"]]) == ["Et", "", "tmL"]


@pytest.mark.parametrize(
    "layout, more, expected",
    [
        ("'Et*17|t*14L'", [], f"`{LAYOUT[1:]}=Et*17|t*14L`: layers (t): 31 there, 32 in the model"),
        ("'Et*12|t*10|t*10L'", [], "stages are 3, no multiple of parallelism.pipeline_model_parallel_size=2; change"),
        ("'Et*16|t*16L'", [VIRTUAL + "=2"], "are 2; parallelism.pipeline_model_parallel_size=2 and virtual_pipeline"),
        ("'Et*16|x*16L'", [], "can't be read from 'x*16L' on; stages are separated by |"),
        ("'t*16|t*16'", [], "must have one E, at its very beginning, and one L, at its very end"),
        ("'Et*16|Et*16L'", [], "must have one E, at its very beginning"),
        ("'Et*16|t*16mL'", [], "layers of multi-token prediction (m): 1 there, 0 in the model"),
        ("'E(t*99999)*99999|L'", [], "has more than 100,000 layers and stages"),
        ("''", [], "stages are 1, no multiple of"),
        ("17", [], "=17`: is neither a text nor a list of stages; "),
        ("[[embedding,decoder],[loss]]", [], "layers (t): 1 there, 32 in the model"),
        ("[[embedding],[t]]", [], "t: is none of embedding, decoder, mtp, loss"),
        ("[embedding,loss]", [], "embedding: is no stage, which is a list of names"),
        (
            "'Et*20|t*12L'",
            ["trainer.recompute=full", "trainer.recompute_layers=21"],
            "no pipeline stage has more than 20",
        ),
    ],
)
def test_what_contradicts_the_model_or_the_sizes_is_refused(layout, more, expected):
    with pytest.raises(UserError) as error:
        checks.check(compose([*WORDS, f"{LAYOUT}={layout}", *more]), 2)
    assert expected in str(error.value)


@pytest.mark.parametrize("layout", ["'E,t*20|t*12,L'", "'E(t*8|)*3t*8L'"])
def test_what_fits_is_not(layout):
    checks.check(compose([*WORDS, f"{LAYOUT}={layout}"]), 2)


@pytest.mark.parametrize(
    "options, layers, stages",
    [
        ({"num_layers_in_first_pipeline_stage": 4}, 32, 2),
        ({"num_layers_in_last_pipeline_stage": 2}, 32, 4),
        ({"num_layers_in_first_pipeline_stage": 6, "num_layers_in_last_pipeline_stage": 4}, 30, 4),
        ({"num_layers_in_first_pipeline_stage": 20, "num_layers_in_last_pipeline_stage": 12}, 32, 2),
        ({"account_for_embedding_in_pipeline_split": True, "account_for_loss_in_pipeline_split": True}, 30, 4),
        ({"account_for_loss_in_pipeline_split": True, "virtual_pipeline_model_parallel_size": 2}, 31, 4),
        ({"num_layers_in_first_pipeline_stage": 4, "virtual_pipeline_model_parallel_size": 2}, 28, 4),
    ],
)
def test_stages_have_the_layers_that_megatron_builds(options, layers, stages):
    block = pytest.importorskip("megatron.core.transformer.transformer_block")
    config = block.TransformerConfig(
        num_layers=layers,
        hidden_size=8,
        num_attention_heads=1,
        pipeline_model_parallel_size=stages,
        pipeline_dtype=torch.float32,
        **options,
    )
    built = []
    for rank in range(stages):
        parts = range(options.get("virtual_pipeline_model_parallel_size", 1))
        built.append(sum(block.get_num_layers_to_build(config, vp_stage=part, pp_rank=rank) for part in parts))
    assert own_stages(options, layers, stages) == tuple(built)


def test_virtual_stages_of_a_layout_go_round():
    options = {"pipeline_model_parallel_layout": "Et*3|t*4|t*5|t*6L"}
    assert own_stages(options, 18, 2) == (8, 10)
    assert own_stages(options, 18, 4) == (3, 4, 5, 6)
    assert own_stages(options, 17, 2) is None  # which `checks` refuses


def test_what_is_no_number_of_layers_is_refused_by_a_search_too():
    words = [*WORDS, f"{MODEL}num_layers_in_first_pipeline_stage=some", "parallelism=auto"]
    with pytest.raises(UserError, match="num_layers_in_first_pipeline_stage=some`: must be a positive whole number"):
        auto.choose(compose(words), 2, find_gpu("h200"), transformer_engine=True)
