"""Which settings an answer has: those of the command line, of the run, and one of the model's file; never another's."""

import json
import shutil
import sys

import pytest
import torch

from posttrain.errors import UserError
from posttrain.generate.__main__ import main
from posttrain.generate.answerer import Answerer
from posttrain.generate.decoding import continuations
from posttrain.generate.live_model import load_model
from posttrain.generate.load import template_of
from posttrain.generate.questions import question
from posttrain.generate.sampling import Sampling

PROMPTS = ["hello", "la la la la la la la la", "x"]
# Fields of generation_config.json, each with a value that changes what transformers answers, or that it refuses.
OF_THE_FILE = {
    "bad_words_ids": [[13]],
    "forced_eos_token_id": 5,
    "min_new_tokens": 9,
    "min_p": 0.9,
    "no_repeat_ngram_size": 1,
    "num_beams": 3,
    "num_return_sequences": 2,
    "repetition_penalty": 3.0,
    "return_dict_in_generate": True,
    "sequence_bias": [[[13], 50.0]],
    "stop_strings": ["a"],
    "suppress_tokens": list(range(100)),
    "temperature": 0.01,
    "max_length": 3,
    "max_time": 1e-9,
    "prompt_lookup_num_tokens": 3,
}
# The same in config.json, where older models have them.
OF_CONFIG = ("no_repeat_ngram_size", "min_new_tokens", "repetition_penalty", "num_return_sequences", "num_beams")
REFUSING = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
THINKING = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% if enable_thinking %}hm{% endif %}{% endif %}"
)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A tiny random Llama with a tokenizer, and the same object of transformers."""
    from tiny_tokenizer import byte_tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

    directory = tmp_path_factory.mktemp("plain")
    byte_tokenizer().save_pretrained(directory)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=288, max_position_embeddings=64, bos_token_id=None, eos_token_id=260, **sizes)
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(directory)
    return directory, model


@pytest.fixture
def copy(plain, tmp_path):
    """The directory again, to be changed."""
    shutil.copytree(plain[0], tmp_path / "model")
    return tmp_path / "model"


def ask(directory, sampling, batch_size=8):
    answerer = Answerer(*load_model(directory), sampling, batch_size, template_of(str(directory)))
    return answerer([answerer.encode(question(prompt)) for prompt in PROMPTS])


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command in this process; returns (exit code, stdout, stderr)."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["generate", *map(str, words)])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return run


def test_nothing_else_is_left_to_the_models_file(plain, copy, capsys):
    file = copy / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | OF_THE_FILE | {"do_sample": True}))
    for sampling in (Sampling(8), Sampling(8, temperature=0.7, top_p=0.9, seed=3)):
        expected = ask(plain[0], sampling)
        capsys.readouterr()
        assert ask(copy, sampling) == expected
        said = capsys.readouterr().err
        assert "not applied" in said
        for name in ("do_sample", *OF_THE_FILE):
            assert f" {name}=" in said


def test_nor_to_config_json(plain, copy):
    file = copy / "config.json"
    fields = json.loads(file.read_text())
    (copy / "generation_config.json").unlink()
    expected = ask(plain[0], Sampling(8))
    for name in OF_CONFIG:
        file.write_text(json.dumps(fields | {name: OF_THE_FILE[name]}))
        assert ask(copy, Sampling(8)) == expected, name


def test_nor_to_that_of_an_adapters_base(plain, copy, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(copy)
    get_peft_model(model, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    file = copy / "generation_config.json"
    expected = ask(plain[0], Sampling(8))
    for name in ("no_repeat_ngram_size", "num_return_sequences", "return_dict_in_generate"):
        file.write_text(json.dumps({"eos_token_id": 260, name: OF_THE_FILE[name]}))
        assert ask(tmp_path / "adapter", Sampling(8)) == expected


def test_end_tokens_of_the_file_are_honoured(plain, copy):
    model, tokenizer = load_model(plain[0])
    prompt = Answerer(model, tokenizer, Sampling()).encode(question("hello"))
    [(_, free)] = continuations(model, [prompt], set(), 0, Sampling(8))
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [260, free[3]]}))
    assert ask(copy, Sampling(8))[0] == tokenizer.decode(free[: free.index(free[3])])


@pytest.mark.parametrize("pad", ["eos", "another"])
def test_the_penalty_sees_a_rows_own_tokens(plain, pad):
    """As transformers with each prompt alone, whatever pads it."""
    directory, right = plain
    model, tokenizer = load_model(directory)
    ends = tokenizer.eos_token_id
    prompts = [Answerer(model, tokenizer, Sampling()).encode(question(prompt)) for prompt in PROMPTS]
    pad_id = ends if pad == "eos" else 13
    found = dict(continuations(model, prompts, {ends}, pad_id, Sampling(24, repetition_penalty=1.8)))
    for index, prompt in enumerate(prompts):
        ids = torch.tensor([prompt])
        out = right.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=24,
            repetition_penalty=1.8,
            eos_token_id=ends,
            pad_token_id=0,
        )
        alone = out[0, len(prompt) :].tolist()
        assert found[index] == (alone[: alone.index(ends)] if ends in alone else alone)


def test_a_runs_template_has_the_runs_variables(plain, copy, run):
    """The text before an answer is that of training; the command line wins."""
    (copy / "chat_template.jinja").write_text(THINKING)
    parent = copy.parent
    copy.rename(parent / "hf")
    (parent / "config.yaml").write_text("model: {}\ntemplate: {variables: {enable_thinking: true}}\n")
    assert template_of(str(parent)).variables == template_of(str(parent / "hf")).variables == {"enable_thinking": True}
    model, tokenizer = load_model(parent / "hf")
    trained = Answerer(model, tokenizer, Sampling(), template=template_of(str(parent)))
    right = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, return_dict=True, enable_thinking=True
    )
    assert trained.encode(question("hi")) == right["input_ids"]
    words = ["hello", "--max-new-tokens", "8"]
    _, on, _ = run(parent, *words)
    _, off, _ = run(parent, *words, "--template-variables", '{"enable_thinking": false}')
    assert on != off


def test_one_system_turn(copy, run, tmp_path):
    (copy / "chat_template.jinja").write_text("{% for m in messages %}{{ m.role[0] }}: {{ m.content }}\n{% endfor %}")
    rows = tmp_path / "rows.jsonl"
    turns = [{"role": "system", "content": "theirs"}, {"role": "user", "content": "hello"}]
    rows.write_text(json.dumps({"messages": turns}) + "\n")
    code, answer, said = run(copy, "--file", rows, "--system", "mine", "--max-new-tokens", "8")
    assert code == 0 and "--system replaces the system turn of 1 of 1 prompts" in said
    assert run(copy, "hello", "--system", "mine", "--max-new-tokens", "8") == (0, answer, "")
    assert run(copy, "--file", rows, "--max-new-tokens", "8")[1] != answer


def test_tools_are_told_or_refused(copy, run, tmp_path):
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"messages": [{"role": "user", "content": "1+1"}], "tools": [tool]}) + "\n")
    code, _, said = run(copy, "--file", rows)
    assert code == 2 and "prompt '1+1': the template leaves out the tool definitions" in said
    knowing = "{{ tools | tojson }}" + REFUSING
    (copy / "chat_template.jinja").write_text(knowing)
    from posttrain.generate.questions import read_prompts

    model, tokenizer = load_model(copy)
    right = tokenizer.apply_chat_template(
        [{"role": "user", "content": "1+1"}], tools=[tool], add_generation_prompt=True, return_dict=True
    )
    assert Answerer(model, tokenizer, Sampling()).encode(read_prompts(rows)[0]) == right["input_ids"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["hi", "--top-p", "0.5"], "top_p=0.5: has no effect at a temperature of 0"),
        (["hi", "--top-k", "5"], "top_k=5: has no effect at a temperature of 0"),
        (
            ["hi", "--temperature", "1e-45"],
            "temperature=1e-45: must be 0, the most likely token each time, or at least",
        ),
        (["hi", "--seed", str(2**70)], "argument --seed: must be at most 2147483647"),
        (["hi", "--temperature", "1e30"], "argument --temperature: must be at least 0, at most 1000"),
        (["hi", "--repetition-penalty", "1e-300"], "must be at least 0.01"),
        (["hi", "--max-new-tokens", str(10**30)], "must be at most"),
        (
            ["hi", "max_new_tokens=8"],
            "max_new_tokens=8: a setting, not a prompt; of this command it is --max-new-tokens 8",
        ),
    ],
)
def test_refused_before_anything_is_loaded(run, words, message):
    code, out, said = run("somewhere/else/that/is/nowhere", *words)
    assert code == 2 and out == "" and message in said


def test_refused_by_the_model(copy, run, tmp_path):
    (copy / "chat_template.jinja").write_text(REFUSING)
    code, _, said = run(copy, "hi", "--system", "s")
    assert code == 2 and said == "posttrain: prompt 'hi': the template model refuses it: System role not supported\n"
    (copy / "chat_template.jinja").unlink()
    rows = tmp_path / "rows.jsonl"
    turns = [{"role": role, "content": role} for role in ("user", "assistant", "user")]
    rows.write_text(json.dumps({"messages": turns}) + "\n")
    code, _, said = run(copy, "hi", "--system", "s")
    assert code == 2 and "--system: the model's tokenizer has no chat template" in said
    code, _, said = run(copy, "--file", rows)
    assert code == 2 and "prompt 'user': the tokenizer has no chat template" in said
    assert run(copy, "hi")[0] == 0


def test_a_template_that_drops_the_system_prompt(copy, run):
    (copy / "chat_template.jinja").write_text(
        "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}"
    )
    code, _, said = run(copy, "hi", "--system", "be brief")
    assert code == 2 and "the template leaves out a system message" in said


def test_longer_than_the_positions(copy, run):
    code, out, said = run(copy, "la " * 40, "--max-new-tokens", "4")
    assert code == 0 and out
    assert "a prompt has" in said and "the model's max_position_embeddings is 64" in said
    assert run(copy, "la", "--max-new-tokens", "4")[2] == ""


def test_text_of_a_special_token_stays_text(plain):
    """As in training; transformers would end the user's turn there."""
    answerer = Answerer(*load_model(plain[0]), Sampling())
    end = answerer.tokenizer.eos_token_id
    assert answerer.encode(question("a<|im_end|>b")).count(end) == answerer.encode(question("ab")).count(end) == 1


@pytest.mark.parametrize("words", [[], ["--temperature", "1"]])
def test_logits_of_which_no_token_can_be_chosen(copy, run, words):
    """Greedy, transformers answers with token 0 again and again; sampling, it fails."""
    from safetensors.torch import load_file, save_file

    weights = load_file(copy / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    code, out, said = run(copy, "hello", *words)
    assert code == 2 and out == "" and "logits are NaN or infinite" in said


def test_files_of_other_editors(copy, run, tmp_path):
    """A mark of the byte order and Windows' line ends are no part of a prompt."""
    words = ["--max-new-tokens", "8"]
    _, expected, _ = run(copy, "hello", "x", *words)
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello\r\nx\r\n")
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"prompt": "hello"}\r\n{"prompt": "x"}\r\n')
    for name in ("a.txt", "a.jsonl"):
        assert run(copy, "--file", tmp_path / name, *words)[1] == expected


def test_half_characters_can_be_printed(copy, run, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "a\\ud800b"}\n')
    code, out, _ = run(copy, "--file", tmp_path / "a.jsonl", "--json", "--max-new-tokens", "2")
    assert code == 0 and json.loads(out.encode())["prompt"] == "a?b"


def test_a_mistyped_run(run, tmp_path, monkeypatch):
    for name in ("my_run", "other"):
        (tmp_path / "outputs" / name).mkdir(parents=True)
        (tmp_path / "outputs" / name / "status.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for what in ("outputs/my_rum", "./outputs/my_rum", f"{tmp_path}/outputs/my_rum/checkpoints"):
        code, _, said = run(what, "hi")
        assert code == 2 and "no such directory; in " in said
        assert "outputs there are: my_run, other; give a run directory" in said
    code, _, said = run("output/my_run", "hi")
    assert code == 2 and "output/my_run: is not a directory here nor in the hub's cache" in said
    assert "model.path" not in said


def test_evaluate_has_the_same_rule():
    from omegaconf import OmegaConf

    from posttrain.evaluate.settings import sampling_of

    options = OmegaConf.create({"max_new_tokens": 8, "temperature": 0.0, "top_p": 0.5})
    with pytest.raises(UserError, match=r"evaluate\.top_p=0\.5: has no effect"):
        sampling_of(options)
