"""Asking a model: what counts as one, what comes back, and where an answer ends."""

import io
import json
import re
import subprocess
import sys
import time

import pytest

from posttrain.data.conversation import Conversation, Message
from posttrain.errors import UserError
from posttrain.generate.__main__ import build_parser, main
from posttrain.generate.answerer import Answerer
from posttrain.generate.decoding import stop_tokens
from posttrain.generate.load import export_of
from posttrain.generate.questions import question, read_prompts
from posttrain.generate.sampling import Sampling
from posttrain.generate.token_stream import AnswerStream, Progress
from posttrain.utils import working


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny random Llama with a tokenizer."""
    import torch
    from tiny_tokenizer import byte_tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

    directory = tmp_path_factory.mktemp("model")
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(directory)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=288, eos_token_id=260, **sizes)).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def loaded(model):
    from posttrain.generate.live_model import load_model

    return load_model(model)


def ask(answerer, *prompts):
    return answerer([answerer.encode(question(prompt)) for prompt in prompts])


def test_a_streamed_answer_is_the_whole_one(loaded):
    """Random weights answer with bytes that are mostly no characters: what never becomes one comes at the end."""
    for seed in range(4):
        answerer = Answerer(*loaded, Sampling(max_new_tokens=40, temperature=1.0, seed=seed))
        prompt = answerer.encode(question("hello"))
        pieces = []
        answer = answerer.stream(prompt, pieces.append)
        assert answerer([prompt]) == [answer] == ["".join(pieces)]
        assert len(pieces) > 1


def test_text_comes_as_soon_as_its_characters_are_whole(loaded):
    """Each piece is what the tokens so far have more than those before; a character of four tokens is one piece."""
    import torch

    _, tokenizer = loaded
    text = "  two spaces,\n\tÄpfel, 日本 and 👩 .\n"
    ids = tokenizer(text)["input_ids"]
    pieces = []
    stream = AnswerStream(len(ids), tokenizer, {260}, pieces.append)
    for token in [*ids, 260]:
        stream.put(torch.tensor([token]))
    assert "".join(pieces) == text and "👩" in pieces and not any("\ufffd" in piece for piece in pieces)


def test_bytes_that_are_no_text_end_the_stream(loaded):
    """A byte-fallback tokenizer, as Llama 2's, whose next token turns the bytes shown so far into other characters."""
    import torch
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    vocab = {"a": 0, "<unk>": 257, **{f"<0x{byte:02X}>": byte + 1 for byte in range(256)}}
    backend = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    ids = [vocab["<0x41>"], vocab["<0xE3>"], vocab["<0x42>"], vocab["a"]]
    pieces = []
    stream = AnswerStream(len(ids), tokenizer, set(), pieces.append)
    for token in ids:
        stream.put(torch.tensor([token]))
    text = tokenizer.decode(ids)
    stream.finish(text)
    assert pieces == ["A", f"\n{text}"] and text.endswith("a")


def test_progress_is_told_in_tokens(loaded, monkeypatch):
    told = []
    monkeypatch.setattr(working, "phase", lambda name, done=0, total=0, unit="": told.append((done, unit)))
    ask(Answerer(*loaded, Sampling(max_new_tokens=3), batch_size=2), "a", "b", "c")
    assert [done for done, _ in told] == [0, 1, 2, 3] * 2
    assert told[0][1] == "of at most 3 tokens, prompts 1 to 2 of 3"
    last = r"of at most 3 tokens, prompts 3 to 3 of 3, 9 tokens in all, ([\d,]+\.\d) a second"
    assert re.fullmatch(last, told[-1][1])
    ask(Answerer(*loaded, Sampling(max_new_tokens=3)), "a")
    assert re.fullmatch(r"of at most 3 tokens, [\d.]+ a second", told[-1][1])


def test_tokens_of_answers_that_have_ended_are_not_counted():
    """Two batches, of two and of one prompt; 9 ends an answer, and a row that has ended is filled up with 0."""
    import torch

    began = time.monotonic()
    progress = Progress(4, 3, stop={9})
    assert (progress.seconds, progress.rate) == (0.0, 0.0)
    for step in ([[5, 5], [5, 5]], [1, 9], [2, 0], [9, 0]):
        progress.put(torch.tensor(step))
    progress.end()
    assert (progress.tokens, progress.generated, progress.answered) == (3, 4, 2)
    between = progress.seconds
    time.sleep(0.05)
    assert progress.seconds == between
    for step in ([[5]], [9]):
        progress.put(torch.tensor(step))
    progress.end()
    assert progress.generated == 5 and progress.answered == 3
    assert between < progress.seconds <= time.monotonic() - began - 0.05
    assert progress.rate == pytest.approx(5 / progress.seconds)


def test_what_is_a_model(tmp_path, model):
    assert export_of(model) == model
    run = tmp_path / "run"
    (run / "adapter").mkdir(parents=True)
    assert export_of(run) is None
    (run / "adapter" / "adapter_config.json").write_text("{}")
    assert export_of(run) == run / "adapter"


def test_prompts_may_follow_options():
    settings = build_parser().parse_intermixed_args(["DIR", "--system", "s", "one", "two"])
    assert settings.prompts == ["one", "two"]


def test_a_batch_is_answered_as_one_at_a_time(loaded):
    """Left padding and the key-value cache change nothing, whatever the lengths."""
    prompts = ["hello", "la " * 20, "x", "hello world"]
    together = ask(Answerer(*loaded, Sampling(max_new_tokens=8), batch_size=4), *prompts)
    alone = ask(Answerer(*loaded, Sampling(max_new_tokens=8), batch_size=1), *prompts)
    assert together == alone and len(set(together)) > 1


def test_the_cache_gives_what_whole_passes_give(loaded):
    """Greedy tokens, each from a pass over all tokens before it."""
    import torch

    from posttrain.generate.decoding import continuations

    model, tokenizer = loaded
    prompt = tokenizer("hello world")["input_ids"]
    ids = list(prompt)
    for _ in range(8):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    found = dict(continuations(model, [prompt], set(), 0, Sampling(max_new_tokens=8)))
    assert found[0] == ids[len(prompt) :]


def test_an_answer_ends_with_the_turn(loaded):
    """The template's end of turn stops, though the model's and the tokenizer's own end token are others."""
    from tiny_tokenizer import byte_tokenizer

    model, _ = loaded
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = "<|endoftext|>"
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert model.generation_config.eos_token_id != end != tokenizer.eos_token_id
    assert stop_tokens(model, tokenizer) >= {end, tokenizer.eos_token_id, model.generation_config.eos_token_id}
    answerer = Answerer(model, tokenizer, Sampling(max_new_tokens=20))
    free = ask(answerer, "hello")[0]
    first = answerer.tokenizer(free)["input_ids"][0]
    answerer.stop |= {first}
    assert len(free) > 1 and ask(answerer, "hello") == [""]
    tokenizer.chat_template = None
    assert end not in stop_tokens(model, tokenizer)


def test_sampling_repeats_with_its_seed(loaded):
    def answers(**more):
        return ask(Answerer(*loaded, Sampling(max_new_tokens=12, temperature=1.0, **more)), "hello", "world")

    assert answers(seed=1) == answers(seed=1) != answers(seed=2)
    greedy = ask(Answerer(*loaded, Sampling(max_new_tokens=12)), "hello", "world")
    assert answers(top_k=1) == greedy == answers(top_p=1e-6)


def test_typed_bytes_that_are_not_utf8_are_answered(loaded):
    typed = b"caf\xe9".decode("utf-8", "surrogateescape")
    answerer = Answerer(*loaded, Sampling(max_new_tokens=4))
    assert ask(answerer, typed) == ask(answerer, "caf?")


def test_prompts_of_a_file(tmp_path):
    (tmp_path / "a.txt").write_text('one\n\n{"prompt": 1}\n')
    assert read_prompts(tmp_path / "a.txt") == [question("one"), question('{"prompt": 1}')]
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    rows = [{"messages": turns}, {"prompt": "one"}, {"prompt": turns[2:]}, {"prompt": "one", "system": "s"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    whole = Conversation([Message("user", "a"), Message("assistant", "b"), Message("user", "c")])
    system = Conversation([Message("system", "s"), Message("user", "one")])
    assert read_prompts(tmp_path / "a.jsonl") == [whole, question("one"), question("c"), system]
    for text, message in (
        ("{", "not JSON"),
        ("[]", "requires"),
        ('{"messages": [1]}', "line 1: field `messages.0.`: expected an object"),
        ('{"messages": []}', "`messages` has no messages"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "there is nothing to answer"),
        ('{"q": ""}', "line 1"),
    ):
        (tmp_path / "b.jsonl").write_text(text + "\n")
        with pytest.raises(UserError, match=message):
            read_prompts(tmp_path / "b.jsonl")
    with pytest.raises(UserError, match="no such file"):
        read_prompts(tmp_path / "none")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(UserError, match="can't be read"):
        read_prompts(tmp_path / "latin.txt")
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(UserError, match="no prompt"):
        read_prompts(tmp_path / "empty.txt")


@pytest.mark.parametrize(
    "option, value, message",
    [
        ("--temperature", "-1", "at least 0"),
        ("--temperature", "nan", "at least 0"),
        ("--temperature", "warm", "invalid number value"),
        ("--top-p", "0", "more than 0, at most 1"),
        ("--top-p", "1.5", "more than 0, at most 1"),
        ("--top-k", "-4", "at least 0"),
        ("--repetition-penalty", "0", "at least 0.01, at most 100"),
        ("--max-new-tokens", "0", "at least 1"),
        ("--seed", str(2**70), "at most 2147483647"),
        ("--template-variables", "[1]", "must be a JSON object"),
    ],
)
def test_sampling_out_of_range(option, value, message, capsys):
    with pytest.raises(SystemExit) as stop:
        build_parser().parse_intermixed_args(["DIR", "hello", option, value])
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_what_a_model_cannot_read():
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from posttrain.generate.decoding import check_fits, continuations

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=16, n_embd=8, n_layer=1, n_head=2)).eval()
    check_fits(model, [[1] * 16])
    with pytest.raises(UserError, match="16 positions"):
        check_fits(model, [[1] * 16], new_tokens=1)
    with pytest.raises(UserError, match="token 32 has no embedding, the model has 32"):
        check_fits(model, [[1], [32]])
    with pytest.raises(UserError, match="the prompt is empty"):
        check_fits(model, [[]])
    found = dict(continuations(model, [[1] * 10, [2] * 3], set(), 0, Sampling(max_new_tokens=100)))
    assert [len(found[index]) for index in range(2)] == [6, 13]  # as far as there are positions


def test_a_chat_remembers(model, monkeypatch, capsys):
    """The second turn is asked with the first one and its answer before it."""
    seen = []
    encode = Answerer.encode
    monkeypatch.setattr(Answerer, "encode", lambda self, chat: seen.append(chat.messages) or encode(self, chat))
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\nand now?\n\nafter the end\n"))
    monkeypatch.setattr(sys, "argv", ["generate", str(model), "--system", "s", "--max-new-tokens", "4"])
    try:
        main()
    finally:
        working.stop()
    assert [[turn.role for turn in chat] for chat in seen] == [
        ["system", "user"], ["system", "user", "assistant", "user"],
    ]  # fmt: skip
    printed = capsys.readouterr()
    assert seen[1][2].content == printed.out.split("\n")[0]
    assert "posttrain: a chat: each line of standard input is its next turn, and an empty line ends it" in printed.err


def test_answers_from_the_command_line(model, tmp_path):
    (tmp_path / "prompts.txt").write_text("la\n")
    command = [sys.executable, "-m", "posttrain.generate", str(model), "--max-new-tokens", "4", "--json", "hello"]
    done = subprocess.run(
        [*command, "--file", str(tmp_path / "prompts.txt")], capture_output=True, text=True, check=True
    )
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [answer["prompt"] for answer in answers] == ["hello", "la"]


def test_a_missing_model_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["generate", str(tmp_path / "nothing"), "hello"])
    with pytest.raises(SystemExit) as stop:
        main()
    err = capsys.readouterr().err
    assert stop.value.code == 2 and "no such directory" in err and "Traceback" not in err
