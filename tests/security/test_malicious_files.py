"""Models, adapters, checkpoints, data and templates from a stranger: refused in words, and nothing in them runs."""

import gzip
import io
import json
import os
import pickle
import struct

import pytest
import torch
from safetensors.torch import save_file
from tiny_tokenizer import byte_tokenizer

from posttrain.checkpoint import directories, pickles
from posttrain.data.conversation import Conversation, Message, RowError
from posttrain.data.formats import Custom
from posttrain.data.readers import read
from posttrain.data.render import Renderer
from posttrain.data.templates import ChatTemplate
from posttrain.errors import UserError
from posttrain.generate.live_model import load_model
from posttrain.models import HFModel
from posttrain.models.hf_adapter import read_adapter
from posttrain.models.shapes import check_directory

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8, "intermediate_size": 16,
    "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 32,
}  # fmt: skip
DEEP = "[" * 100_000 + "]" * 100_000
CODE = "import payload\npayload.fire()\nclass Evil:\n    pass\n"


class Evil:
    """Runs the payload where it is unpickled."""

    def __reduce__(self):
        import payload

        return payload.fire, ()


def deep(levels):
    return '{"a":' * levels + "1" + "}" * levels


def write_model(directory, config=LLAMA, tensors=None):
    directory.mkdir(exist_ok=True)
    text = config if isinstance(config, str) else json.dumps(config)
    (directory / "config.json").write_text(text)
    save_file(tensors or {"model.embed_tokens.weight": torch.zeros(32, 8)}, directory / "model.safetensors")
    return directory


def header(directory, content, length=None):
    """Replace the weights by a file with this header."""
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw)


AUTO_MAP = {"auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil", "AutoTokenizer": "evil.Evil"}}


@pytest.mark.parametrize("model_type", ["llama", "evil"])
@pytest.mark.parametrize("how", ["train", "generate"])
def test_code_beside_a_model(model_type, how, canary, tmp_path):
    model = write_model(tmp_path / "model", {**LLAMA, **AUTO_MAP, "model_type": model_type})
    (model / "evil.py").write_text(CODE)
    with pytest.raises(UserError):
        HFModel(path=str(model), random_init=True).hf_config() if how == "train" else load_model(model)


def test_code_beside_a_tokenizer(canary, tmp_path):
    byte_tokenizer().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "tokenizer_config.json").read_text())
    saved |= {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(saved))
    (tmp_path / "evil.py").write_text(CODE)
    try:
        HFModel(path=str(tmp_path)).load_tokenizer()
    except UserError as error:
        assert "model.tokenizer" in str(error)


def test_code_is_not_trusted_by_a_configuration_alone(canary, tmp_path, monkeypatch):
    model = write_model(tmp_path / "model", {**LLAMA, **AUTO_MAP, "model_type": "evil"})
    (model / "evil.py").write_text(CODE)
    monkeypatch.delenv("POSTTRAIN_TRUST_REMOTE_CODE", raising=False)
    with pytest.raises(UserError, match="POSTTRAIN_TRUST_REMOTE_CODE"):
        HFModel(path=str(model), random_init=True, trust_remote_code=True).hf_config()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "last.ckpt"])
def test_pickled_weights(name, canary, tmp_path):
    model = write_model(tmp_path / "model")
    (model / "model.safetensors").unlink()
    (model / name).write_bytes(pickle.dumps(Evil()))
    for attempt in (lambda: HFModel(path=str(model)).directory, lambda: load_model(model)):
        with pytest.raises(UserError, match="is a pickle"):
            attempt()


WEIGHT = {"dtype": "F32", "shape": [32, 8], "data_offsets": [0, 1024]}
HEADERS = {
    "longer than the file": lambda d: header(d, {}, length=2**63 - 1),
    "longer than the address space": lambda d: header(d, {}, length=2**64 - 1),
    "of no length": lambda d: header(d, b"", length=0),
    "nested": lambda d: header(d, deep(50_000).encode()),
    "an array": lambda d: header(d, [1, 2]),
    "not text": lambda d: header(d, b"\xff\xfe" * 20),
    "a shape that lies": lambda d: header(d, {"w": {**WEIGHT, "shape": [2**40, 2**40]}}),
    "a negative shape": lambda d: header(d, {"w": {**WEIGHT, "shape": [-32, -8]}}),
    "offsets beyond the end": lambda d: header(d, {"w": {**WEIGHT, "data_offsets": [0, 2**60]}}),
    "offsets that run backwards": lambda d: header(d, {"w": {**WEIGHT, "data_offsets": [1024, 0]}}),
    "tensors in each other": lambda d: header(d, {"v": WEIGHT, "w": WEIGHT}),
    "words for numbers": lambda d: header(d, {"w": {**WEIGHT, "data_offsets": ["0", "1024"]}}),
}


@pytest.mark.parametrize("what", HEADERS)
def test_a_safetensors_header(what, canary, tmp_path):
    model = write_model(tmp_path / "model")
    HEADERS[what](model)
    with pytest.raises(UserError, match=r"model\.safetensors"):
        check_directory(model)


@pytest.mark.parametrize(
    "index",
    [
        {"weight_map": {"w": "../../../etc/passwd"}},
        {"weight_map": {"w": "/etc/passwd.safetensors"}},
        {"weight_map": {"w": "../model/model.safetensors"}},
        {"weight_map": {"w": ["model.safetensors"]}},
        {"weight_map": ["model.safetensors"]},
        {"weight_map": None},
        {},
        [],
        DEEP,
    ],
    ids=lambda index: str(index)[:50],
)
def test_an_index_that_leads_elsewhere(index, canary, tmp_path):
    model = write_model(tmp_path / "model")
    path = model / "model.safetensors.index.json"
    path.write_text(index if isinstance(index, str) else json.dumps(index))
    with pytest.raises(UserError, match=r"index\.json"):
        check_directory(model)


@pytest.mark.parametrize(
    "config",
    [DEEP, "[]", "null", "{", "\x00", {**LLAMA, "num_hidden_layers": 10**12}, {**LLAMA, "num_attention_heads": 0},
     {**LLAMA, "hidden_size": "8; rm -rf"}, {**LLAMA, "vocab_size": -1}, {**LLAMA, "vocab_size": 1e400}],
    ids=lambda config: str(config)[-40:],
)  # fmt: skip
def test_a_models_configuration(config, canary, tmp_path):
    with pytest.raises(UserError, match="model"):
        check_directory(write_model(tmp_path / "model", config))


def write_adapter(directory, **changes):
    directory.mkdir(exist_ok=True)
    config = {
        "peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "base", "target_modules": ["q_proj"],
    }  # fmt: skip
    (directory / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    save_file(
        {f"{name}.lora_A.weight": torch.zeros(2, 8), f"{name}.lora_B.weight": torch.zeros(8, 2)},
        directory / "adapter_model.safetensors",
    )
    return directory


ADAPTERS = {
    "imports a module": {"megatron_core": "imported", "megatron_config": {"a": 1}},
    "imports another module": {"megatron_core": "imported"},
    "never ends": {"alpha_pattern": {"(a+)+$": 8}},
    "never ends in another way": {"rank_pattern": {".*.*.*.*.*.*x": 8}},
    "a broken expression": {"alpha_pattern": {"(": 8}},
    "a pattern of words": {"alpha_pattern": {"q_proj": "os.system"}},
    "patterns in a list": {"alpha_pattern": ["q_proj"]},
    "alpha in words": {"lora_alpha": "__import__('os')"},
    "no alpha": {"lora_alpha": None},
    "another kind": {"peft_type": "PROMPT_TUNING"},
    "modules of its own": {"modules_to_save": ["lm_head"]},
    "never ends without repetition": {"alpha_pattern": {"(a|a)" * 30 + "x": 8}},
    "never ends by options": {"alpha_pattern": {"a?" * 40 + "a" * 40: 8}},
    "repeated layers": {"layer_replication": [[0, 1]] * 2000},
    "a negative rank": {"r": -1},
    "a rank in words": {"r": "8"},
    "not a number": {"lora_alpha": float("nan")},
    "a rank without end": {"rank_pattern": {"q_proj": 1e400}},
    "an unknown key": {"next_years_lora": 1},
    "a key of another kind": {"use_dora": "yes"},
    "a name in the way of a kind": {"use_rslora": [1]},
    "another initialisation": {"init_lora_weights": "pissa_niter_16"},
    "an initialisation without end": {"init_lora_weights": ["a"] * 100},
    "activated": {"alora_invocation_tokens": [1]},
    "token rows": {"trainable_token_indices": [1]},
}


@pytest.mark.parametrize("what", ADAPTERS)
def test_an_adapter(what, canary, tmp_path):
    adapter = write_adapter(tmp_path / "adapter", **ADAPTERS[what])
    for attempt in (lambda: read_adapter(adapter), lambda: load_model(adapter)):
        with pytest.raises(UserError, match="adapter_config"):
            attempt()


@pytest.mark.parametrize("key", ["target_modules", "exclude_modules", "layers_pattern"])
def test_peft_searches_for_nothing_that_an_adapter_names(key, tmp_path):
    """Expressions that never end, ranks that fill the memory: the tensors say which modules and which rank."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from posttrain.peft.attach import attach_adapter

    config = LlamaConfig(**{k: v for k, v in LLAMA.items() if k != "architectures"})
    huge = {"r": 2_000_000_000, "rank_pattern": {"q_proj": 500_000_000}, "layers_to_transform": [0]}
    adapter = write_adapter(tmp_path / "adapter", **{key: r"((\w|\.)+)+!"}, **huge)
    model = attach_adapter(LlamaForCausalLM(config), adapter)
    layer = model.base_model.model.model.layers[0].self_attn
    assert layer.q_proj.lora_A["default"].weight.shape == (2, 8) and layer.q_proj.scaling["default"] == 2
    assert not hasattr(layer.k_proj, "lora_A")


def test_an_adapter_of_an_adapter(tmp_path):
    """transformers would have PEFT read the second one's configuration."""
    base = write_adapter(write_model(tmp_path / "base"), target_modules=r"((\w|\.)+)+!")
    adapter = write_adapter(tmp_path / "adapter", base_model_name_or_path=str(base))
    with pytest.raises(UserError, match="is an adapter itself"):
        load_model(adapter)


def test_a_pickled_adapter(canary, tmp_path):
    adapter = write_adapter(tmp_path / "adapter")
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / "adapter_model.bin").write_bytes(pickle.dumps(Evil()))
    for attempt in (lambda: read_adapter(adapter), lambda: load_model(adapter)):
        with pytest.raises(UserError, match="is a pickle"):
            attempt()


def seal(checkpoint):
    """Seal what an attacker has put there, as a save would."""
    (checkpoint / "train_state.pt").touch()
    root = checkpoint.parent
    partial = directories.directory(root / directories.PARTIAL, directories.step_of(checkpoint))
    partial.parent.mkdir(exist_ok=True)
    checkpoint.rename(partial)
    directories.publish(partial, checkpoint)
    return checkpoint


class Calls:
    """Pickles as a call of a function that is named."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def torch_saved():
    import payload

    buffer = io.BytesIO()
    torch.save(Calls(payload.fire), buffer)
    return buffer.getvalue()


def pickled(what):
    import payload

    return {
        "a function": lambda: pickle.dumps(Calls(payload.fire)),
        "os.system": lambda: pickle.dumps(Calls(os.system, "touch $CANARY")),
        "exec": lambda: pickle.dumps(Calls(exec, "import payload; payload.fire()")),
        "getattr": lambda: pickle.dumps(Calls(getattr, "", "join")),
        "through torch's module": lambda: b"ctorch.distributed.checkpoint.metadata\nos.system\n(S'touch $CANARY'\ntR.",
        "through a dotted name": lambda: b"\x80\x04\x8c\x05torch\x8c\x09os.system\x93\x8c\x0dtouch $CANARY\x85R.",
        "a nested pickle": lambda: pickle.dumps(Calls(pickle.loads, pickle.dumps(Calls(payload.fire)))),
        "an older protocol": lambda: b"cpayload\nfire\n(tR.",
        "in a tensor's bytes": lambda: pickle.dumps(Calls(torch.storage._load_from_bytes, torch_saved())),
    }[what]()


PICKLES = ["a function", "os.system", "exec", "getattr", "through torch's module", "through a dotted name",
           "a nested pickle", "an older protocol", "in a tensor's bytes"]  # fmt: skip


@pytest.mark.parametrize("what", PICKLES)
def test_a_checkpoints_metadata(what, canary, tmp_path):
    """Sealed in order, read by torch's own reader."""
    from torch.distributed.checkpoint import FileSystemReader

    checkpoint = tmp_path / "checkpoints" / "iter_0000002"
    checkpoint.mkdir(parents=True)
    (checkpoint / ".metadata").write_bytes(pickled(what))
    seal(checkpoint)
    assert directories.newest(checkpoint.parent, hashes=True) == (checkpoint, [])
    with pytest.raises(UserError, match="holds a pickle that would run"), pickles.reading(checkpoint):
        FileSystemReader(checkpoint).read_metadata()


@pytest.mark.parametrize("what", PICKLES)
def test_an_object_in_a_checkpoints_shard(what, canary, tmp_path):
    """A real shard whose object was replaced by one that runs; loaded by torch.distributed.checkpoint."""
    import torch.distributed.checkpoint as dcp

    class Shipped:
        """Pickles as `what`, within what torch.save writes."""

        def __reduce__(self):
            import payload

            return payload.fire, ()

    checkpoint = tmp_path / "iter_0000002"
    dcp.save({"weight": torch.ones(3), "note": Shipped()}, checkpoint_id=checkpoint, no_dist=True)
    state = {"weight": torch.zeros(3), "note": None}
    with pytest.raises(UserError, match=r"would run payload\.fire"), pickles.reading(checkpoint):
        dcp.load(state, checkpoint_id=checkpoint, no_dist=True)
    with pytest.raises(UserError, match="would run"), pickles.reading(checkpoint):
        pickle.loads(pickled(what))


class Writer(torch.nn.Module):
    """A TorchScript program that writes into the file whose name is its buffer when it is read."""

    def __init__(self, path):
        super().__init__()
        self.register_buffer("x", torch.tensor(list(b"executed"), dtype=torch.uint8))
        self.path = str(path)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x

    @torch.jit.export
    def __getstate__(self) -> tuple[torch.Tensor, str, bool]:
        return (self.x, self.path, self.training)

    @torch.jit.export
    def __setstate__(self, state: tuple[torch.Tensor, str, bool]) -> None:
        self.x = state[0]
        self.path = state[1]
        self.training = state[2]
        written = torch.from_file(state[1], True, 8, dtype=torch.uint8)
        written.copy_(state[0])
        self.x = written


def torchscript(path):
    """Bytes of an archive that leaves the file `path` behind when torch.jit reads it."""
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(Writer(path)), buffer)
    path.unlink(missing_ok=True)
    return buffer.getvalue()


@pytest.mark.parametrize("name", ["note", "weight"])
def test_a_torchscript_program_in_a_checkpoints_shard(name, canary, tmp_path):
    """torch.load hands such an archive to a reader in C++ that no audit event sees."""
    import torch.distributed.checkpoint as dcp

    checkpoint = tmp_path / "iter_0000002"
    dcp.save({"weight": torch.ones(3), "note": [1, 2]}, checkpoint_id=checkpoint, no_dist=True)
    program = torchscript(canary)
    (checkpoint / "evil.distcp").write_bytes(program)
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    for index, info in metadata.storage_data.items():
        if index.fqn == name:
            metadata.storage_data[index] = type(info)("evil.distcp", 0, len(program))
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    state = {"weight": torch.zeros(3), "note": None}
    with pytest.raises(UserError, match="TorchScript"), pickles.reading(checkpoint):
        dcp.load(state, checkpoint_id=checkpoint, no_dist=True)


@pytest.mark.parametrize("weights_only", [True, False])
def test_a_torchscript_program_for_a_file_of_a_checkpoint(weights_only, canary, tmp_path):
    """train_state.pt, common.pt; within a tensor's bytes, by torch's name and Megatron's; asked for by its reader."""
    program = torchscript(canary)
    (tmp_path / "common.pt").write_bytes(program)
    stored = pickle.dumps(program, protocol=2)[2:-1] + b"\x85R."  # on the stack, in a tuple, called with
    by_torch = b"\x80\x02ctorch.storage\n_load_from_bytes\n" + stored
    by_megatron = b"\x80\x02cmegatron.core.safe_globals\nsafe_load_from_bytes\n" + stored
    for attempt in (
        lambda: torch.load(tmp_path / "common.pt", weights_only=weights_only),
        lambda: torch.load(io.BytesIO(program), weights_only=weights_only),
        lambda: torch.jit.load(tmp_path / "common.pt"),
        lambda: pickle.loads(by_torch),
        lambda: pickle.loads(by_megatron),
    ):
        with pytest.raises(UserError, match="TorchScript"), pickles.reading(tmp_path):
            attempt()
    assert not canary.exists()
    torch.jit.load(io.BytesIO(program))  # that it would have been written otherwise
    assert canary.read_text() == "executed"
    canary.unlink()


def test_an_honest_checkpoint_is_read(tmp_path):
    import torch.distributed.checkpoint as dcp

    dcp.save({"weight": torch.arange(3.0), "note": {"a": [1, None, "x"]}}, checkpoint_id=tmp_path / "c", no_dist=True)
    state = {"weight": torch.zeros(3), "note": {"a": None}}
    with pickles.reading(tmp_path / "c"):
        dcp.load(state, checkpoint_id=tmp_path / "c", no_dist=True)
    assert state["weight"].tolist() == [0, 1, 2] and pickle.loads(pickle.dumps(os.path.join)) is os.path.join


def test_ranks_may_tell_each_other_what_a_checkpoint_may_not(tmp_path):
    """Megatron broadcasts objects of its own while it loads."""
    from fractions import Fraction

    from torch.distributed import distributed_c10d

    sent, size = distributed_c10d._object_to_tensor(Fraction(1, 3), torch.device("cpu"), None)
    with pickles.reading(tmp_path):
        assert distributed_c10d._tensor_to_object(sent, int(size), None) == Fraction(1, 3)
    with pytest.raises(UserError, match=r"would run fractions\.Fraction"), pickles.reading(tmp_path):
        pickle.loads(pickle.dumps(Fraction(1, 3)))


def test_a_run_that_is_converted(canary, tmp_path):
    """`convert export` of a stranger's run directory."""
    from posttrain.convert.checkpoints import find

    checkpoint = tmp_path / "run" / "checkpoints" / "iter_0000002"
    checkpoint.mkdir(parents=True)
    seal(checkpoint)
    laughs = "a: &a [1,1]\n" + "".join(f"x{n}: &x{n} [{', '.join(['*a'] * 400)}]\n" for n in range(200))
    for text in ("model: {_target_: payload.fire}", "a: &a [*a]", laughs, "[]", "", "{}", "model: 3", "\x00"):
        (tmp_path / "run" / "config.yaml").write_text(text)
        with pytest.raises(UserError):
            find(tmp_path / "run")


def test_links_of_a_checkpoints_folder_are_not_followed(tmp_path):
    """What an earlier process left is removed: the links, not what they lead to."""
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("kept")
    root = tmp_path / "checkpoints"
    root.mkdir()
    (root / directories.PARTIAL).symlink_to(precious)
    (root / ".removing-iter_0000002").symlink_to(precious / "file")
    (root / "iter_0000004").symlink_to(precious)
    directories.clean(root)
    directories.remove(root / "iter_0000004")
    directories.clean(root)
    assert (precious / "file").read_text() == "kept" and not list(root.iterdir())


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.popen('touch $CANARY').read() }}",
    "{{ lipsum.__globals__['os'].system('touch $CANARY') }}",
    "{{ joiner.__init__.__globals__ }}",
    "{{ raise_exception.__globals__ }}{{ strftime_now.__globals__ }}",
    "{{ messages.__class__.__base__ }}",
    "{{ messages[0].content.__class__.__init__.__globals__ }}",
    "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "{{ '%s' | format(messages.__class__) }}",
    "{{ ('{0.__class__}' | attr('format'))(messages) }}",
    "{{ messages | map(attribute='__class__') | list }}",
    "{{ messages | attr('__class__') }}",
    "{{ self.__init__.__globals__ }}",
    "{{ caller.__globals__ }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ dict.__base__.__subclasses__() }}",
    "{{ messages[0].content.join.__globals__ }}",
    "{{ (1).__class__.__bases__[0].__subclasses__() }}",
    "{% set x = ''.join.__self__.__class__.__base__ %}{{ x.__subclasses__() }}",
    "{{ get_flashed_messages.__globals__ }}{{ config.__class__ }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os.system('touch $CANARY') }}",
    "{% extends '/etc/passwd' %}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update({'role': 'x'}) }}",
    "{{ range(10 ** 12) | list }}",
]


@pytest.mark.parametrize("escape", ESCAPES)
def test_a_template_stays_in_its_sandbox(escape, canary):
    """Refused, or empty: never an attribute that leads out, a file, or a change of what is rendered."""
    source = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    tokenizer = byte_tokenizer()
    plain = str(Renderer(ChatTemplate(jinja=source), tokenizer).render(Conversation([Message("user", "hi")])))
    try:
        renderer = Renderer(ChatTemplate(jinja=source + escape, require_stop=False), tokenizer)
        text = str(renderer.render(Conversation([Message("user", "hi")])))
    except (RowError, UserError):
        return
    left = text.removeprefix(plain).removeprefix("[Undefined]")
    assert text.startswith(plain) and not set(left) - set("[]<>generator object do_map at 0x123456789abcdef")


@pytest.mark.parametrize("pattern", ["{a.__class__}", "{a[0]}", "{a!r}", "{__import__('os')}", "{a:>9999999999}", "{"])
def test_a_pattern_of_columns_is_no_format_string(pattern):
    with pytest.raises(RowError):
        list(Custom(prompt=pattern, answer="a").conversations({"a": "text"}))


ROWS = {
    "nested": deep(100_000).encode(),
    "a number of a million digits": b'{"a": ' + b"9" * 1_000_000 + b"}",
    "half a character": b'{"a": "\\ud800"}',
    "not a row": b'"text"',
    "nothing": b"null",
}


@pytest.mark.parametrize("kind", ["jsonl", "json"])
@pytest.mark.parametrize("what", ROWS)
def test_a_row_of_data(what, kind, tmp_path):
    path = tmp_path / f"x.{kind}"
    path.write_bytes(b"[" + ROWS[what] + b"]" if kind == "json" else ROWS[what] + b"\n")
    try:
        found = list(read(path))
    except UserError as error:
        assert "x.json" in str(error)
        return
    assert all(isinstance(row, dict | RowError) for _, row in found)


def test_a_file_that_unpacks_without_end(tmp_path):
    """200 MB in 200 kB, without a line end: refused after the size of one row."""
    with gzip.open(tmp_path / "x.jsonl.gz", "wb", compresslevel=1) as file:
        for _ in range(200):
            file.write(b" " * (1 << 20))
    with pytest.raises(UserError, match="longer than 64 MiB"):
        list(read(tmp_path / "x.jsonl.gz"))


@pytest.mark.parametrize("name", ["x.pkl", "x.pt", "x.npy", "x.py", "x.parquet.gz", "x.tar.gz", "x.zip"])
def test_kinds_of_files_that_are_not_read(name, canary, tmp_path):
    (tmp_path / name).write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UserError, match=r"unknown kind of file|unpack it"):
        list(read(tmp_path / name))


def test_a_parquet_file_that_is_none(canary, tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"PAR1" + pickle.dumps(Evil()) + b"PAR1")
    with pytest.raises(UserError, match="not a Parquet file"):
        list(read(tmp_path / "x.parquet"))
