"""Whatever comes in from outside, only our own errors come out. Hypothesis, with the same examples each time."""

import contextlib
import gzip
import json
import string

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf.errors import OmegaConfBaseException
from safetensors.torch import save_file
from tiny_tokenizer import byte_tokenizer

from posttrain.checkpoint import directories
from posttrain.checkpoint.progress import FILE, Progress
from posttrain.config import yaml_file
from posttrain.config.composition import compose, key_paths
from posttrain.data import formats, sources
from posttrain.data.conversation import Conversation, Message, RowError
from posttrain.data.readers import Place, read
from posttrain.data.render import Renderer
from posttrain.data.templates import ChatTemplate
from posttrain.errors import UserError
from posttrain.models.hf_adapter import read_adapter
from posttrain.models.shapes import check_directory
from posttrain.spec import checks
from posttrain.train import rollback
from posttrain.train.metrics import kept_lines


def fuzz(examples):
    return settings(
        max_examples=examples, deadline=None, derandomize=True, database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
    )  # fmt: skip


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12)
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)  # fmt: skip


def mapping(names):
    """Objects with the names that a reader looks for, and others."""
    return st.dictionaries(st.sampled_from(names) | st.text(max_size=6), JSON, max_size=len(names))


KEYS = [key for key in key_paths(compose()) if not key.startswith("logger")]
WORDS = st.builds(
    lambda prefix, key, value: f"{prefix}{key}={value}",
    st.sampled_from(["", "", "", "+", "++", "~"]),
    st.sampled_from(KEYS) | st.text(string.ascii_letters + "._/@", min_size=1, max_size=12),
    st.one_of(
        st.integers().map(str), st.floats().map(str), st.booleans().map(str), st.text(max_size=10),
        st.sampled_from(["null", "???", "[]", "{}", "[1,2]", "{a:1}", "a,b", "${seed}", "${nothing}", "${oc.env:NO}",
                         "${times:a,b}", "'", '"', "\\", "[" * 300, "choice(1,2)", "interval(0,1)", "-1", "1e400"]),
    ),
)  # fmt: skip


@fuzz(60)
@given(st.lists(WORDS, min_size=1, max_size=2))
def test_words_of_a_command(words):
    with contextlib.suppress(UserError, OmegaConfBaseException):  # the command says both in words: compose.explain
        checks.check(compose(words), 0)


FORMATS = {
    "alpaca": (formats.Alpaca(), ["instruction", "input", "output"]),
    "dolly": (formats.Dolly(), ["instruction", "context", "response", "category"]),
    "prompt_completion": (formats.PromptCompletion(), ["prompt", "completion"]),
    "messages": (formats.Messages(), ["messages", "tools"]),
    "sharegpt": (formats.ShareGPT(), ["conversations", "system", "tools"]),
    "custom": (formats.Custom(prompt="{a}: {b.c}", answer="d"), ["a", "b", "d"]),
    "custom messages": (formats.Custom(messages="x.y", tools="t"), ["x", "t"]),
    "oasst": (formats.Oasst(), ["message_id", "parent_id", "role", "text", "lang", "rank", "deleted", "prompt",
                                "message_tree_id"]),
}  # fmt: skip
MESSAGE = mapping(["role", "content", "from", "value", "tool_calls", "weight", "loss", "function_call", "train"])
ROLES = st.sampled_from(["user", "assistant", "system", "tool", "gpt", "human"])
CHAT = st.lists(MESSAGE | st.fixed_dictionaries({"role": ROLES, "content": JSON}), max_size=4)


@pytest.mark.parametrize("name", FORMATS)
def test_rows(name):
    form, names = FORMATS[name]

    @fuzz(120)
    @given(
        st.lists(
            mapping(names) | st.fixed_dictionaries({n: st.text(max_size=5) | CHAT | JSON for n in names}), max_size=3
        )
    )
    def run(rows):
        placed = [(Place("x", index, f"row {index}"), row) for index, row in enumerate(rows)]
        found = list(form.read(iter(placed)) if hasattr(form, "read") else sources._row_by_row(placed, form))
        assert all(isinstance(item, Conversation | RowError) for _, item in found)

    run()


BYTES = st.one_of(
    st.binary(max_size=200),
    JSON.map(lambda value: json.dumps(value).encode()),
    st.lists(JSON, max_size=3).map(lambda rows: "\n".join(map(json.dumps, rows)).encode()),
    st.text('"{}[],:\n\\ue0\t 1', max_size=30).map(str.encode),
    st.text("a,\"\n\r\t;'", max_size=30).map(str.encode),
)


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "tsv", "parquet", "jsonl.gz", "json.zst", "csv.gz"])
def test_files(kind, tmp_path):
    @fuzz(60)
    @given(BYTES, st.booleans())
    def run(content, packed):
        path = tmp_path / f"x.{kind}"
        path.write_bytes(gzip.compress(content) if packed and kind.endswith("gz") else content)
        try:
            assert all(isinstance(row, dict | RowError) for _, row in read(path))
        except UserError as error:
            assert "x." in str(error)

    run()


PIECES = st.lists(
    st.one_of(
        st.sampled_from([
            "{% for m in messages %}", "{% endfor %}", "{{ m.content }}", "{{ m['role'] }}", "{% if m %}",
            "{% endif %}",
            "{{ messages[0] }}", "{{ messages[-1].content | trim }}", "{% set x = 1 %}", "{{ x / 0 }}", "{{ x.y.z }}",
            "{{ raise_exception('no') }}", "{% generation %}", "{% endgeneration %}", "{{ bos_token }}", "{% break %}",
            "{{ eos_token }}", "<|im_start|>", "<|im_end|>", "{{ tools | tojson }}", "{{ 'a' * 99 }}", "{{", "}}", "{%",
            "{{ messages | length }}", "{{ strftime_now('%Y') }}", "{{ strftime_now(1) }}", "{{ m.content.split(1) }}",
            "{{ [1, 2] | join(messages) }}", "{% macro f(a) %}", "{% endmacro %}", "{{ f(1) }}", "{{ m.content[5:] }}",
            "{{ m.content.replace('a', m) }}", "{{ m.content ~ m }}", "{{ '%d' % 'x' }}", "{{ none.x }}",
        ]),
        st.text(max_size=5),
    ),
    max_size=9,
).map("".join)  # fmt: skip
CONVERSATION = Conversation([Message("user", "hi"), Message("assistant", "a <|im_end|> b")])


@fuzz(150)
@given(PIECES)
def test_templates(source):
    try:
        renderer = Renderer(ChatTemplate(name="custom", jinja=source), byte_tokenizer())
        text = renderer.render(CONVERSATION)
        renderer.trained(CONVERSATION, text, [1])
    except (UserError, RowError):
        pass


@fuzz(150)
@given(st.one_of(JSON, st.fixed_dictionaries({"files": mapping(["a", "../a", "/a", "sub/a"])})), st.booleans())
def test_seals(tmp_path_factory, content, hashes):
    checkpoint = tmp_path_factory.getbasetemp() / "seals" / "iter_0000002"
    checkpoint.mkdir(parents=True, exist_ok=True)
    (checkpoint / directories.SEAL).write_text(json.dumps(content))
    assert isinstance(directories.problem(checkpoint, hashes), str)


@fuzz(100)
@given(
    JSON
    | mapping(["tokens", "seconds", "samples", "losses", "rollbacks", "validations"])
    | st.text().map(lambda text: (text,))
)
def test_small_files_of_a_run(tmp_path_factory, content):
    """progress.json, rollbacks.json, config.yaml, metrics.jsonl: what a person or a disk has changed."""
    folder = tmp_path_factory.getbasetemp() / "small"
    folder.mkdir(exist_ok=True)
    text = content[0] if isinstance(content, tuple) else json.dumps(content)
    for name in (FILE, rollback.FILE, "config.yaml"):
        (folder / name).write_text(text, encoding="utf-8", errors="ignore")
    for reader in (Progress().read, rollback.read, lambda f: yaml_file.read(f / "config.yaml")):
        try:
            reader(folder)
        except UserError as error:
            assert str(folder) in str(error)
    assert isinstance(kept_lines(text, 3, False), str)


ADAPTER = mapping(
    ["peft_type", "lora_alpha", "r", "use_dora", "use_rslora", "alpha_pattern", "rank_pattern", "bias",
     "target_modules", "modules_to_save", "base_model_name_or_path", "megatron_core"]
)  # fmt: skip


@fuzz(100)
@given(st.one_of(JSON, ADAPTER, ADAPTER.map(lambda found: {"lora_alpha": 4, **found, "peft_type": "LORA"})))
def test_adapters(tmp_path_factory, config):
    folder = tmp_path_factory.getbasetemp() / "adapter"
    if not folder.exists():
        folder.mkdir()
        name = "base_model.model.model.layers.0.self_attn.q_proj"
        tensors = {f"{name}.lora_A.weight": torch.zeros(2, 8), f"{name}.lora_B.weight": torch.zeros(8, 2)}
        save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    try:
        read_adapter(folder)
    except UserError as error:
        assert str(folder) in str(error)


SIZES = ["hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size", "intermediate_size", "head_dim",
         "num_key_value_heads", "max_position_embeddings", "n_embd", "n_layer"]  # fmt: skip


@fuzz(100)
@given(st.one_of(JSON, mapping(SIZES), st.fixed_dictionaries({name: st.integers(-2, 64) | SCALARS for name in SIZES})))
def test_models(tmp_path_factory, config):
    folder = tmp_path_factory.getbasetemp() / "model"
    if not folder.exists():
        folder.mkdir()
        save_file({"model.layers.0.mlp.up_proj.weight": torch.zeros(16, 8)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    try:
        check_directory(folder)
    except UserError as error:
        assert str(folder) in str(error)
