"""Losses against a plain loop of transformers, categories, sets, scores, and what is refused."""

import json
import math
import shutil

import pytest

from posttrain.utils import working

PAIRS = "data=prompt_completion"


def plain_loss(directory, conversations):
    """(sum of losses, supervised tokens) of [(question, answer)] by transformers and its own rendering."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    total, count = 0.0, 0
    for question, answer in conversations:
        asked = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        before, after = tokenizer(asked)["input_ids"], tokenizer(f"{answer}<|im_end|>")["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([before + after])).logits[0]
        losses = torch.nn.functional.cross_entropy(logits[len(before) - 1 : -1], torch.tensor(after), reduction="sum")
        total, count = total + losses.item(), count + len(after)
    return total, count


@pytest.mark.parametrize("batch_tokens", [1, 100, 4096])
def test_loss_is_that_of_a_plain_loop(evaluate, tiny, questions, batch_tokens, capsys):
    result = evaluate(tiny, PAIRS, f"data.path={questions / 'a.jsonl'}", f"evaluate.batch_tokens={batch_tokens}")
    rows = [json.loads(line) for line in (questions / "a.jsonl").read_text().splitlines()]
    found = result["datasets"]["a"]
    total, count = plain_loss(tiny, [(row["prompt"], row["completion"]) for row in rows])
    assert found["supervised_tokens"] == count and found["conversations"] == 12 and found["split"] == "train"
    assert found["loss"] == pytest.approx(total / count, rel=1e-6)
    assert found["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)
    assert set(found["categories"]) == {"sum", "word", "(none)"}
    for name, part in found["categories"].items():
        chosen = [row for row in rows if (row["category"] or "(none)") == name]
        total, count = plain_loss(tiny, [(row["prompt"], row["completion"]) for row in chosen])
        assert part["loss"] == pytest.approx(total / count, rel=1e-6) and part["supervised_tokens"] == count
    assert "a, train" in capsys.readouterr().out


def test_several_sets_and_rows_left_out(evaluate, tiny, questions, capsys):
    sets = ",".join(
        f'{name}:"{PAIRS} data.path={questions}/{name}.jsonl data.on_error=skip"' for name in ("a", "b")
    )  # fmt: skip
    result = evaluate(tiny, f"evaluate.datasets={{{sets}}}", "metric=exact_match", "evaluate.max_new_tokens=3")
    a, b = result["datasets"]["a"], result["datasets"]["b"]
    assert b["rows"]["kept"] == 5 and sum(b["rows"]["dropped"].values()) == 1 and "categories" not in b
    total = a["loss"] * a["supervised_tokens"] + b["loss"] * b["supervised_tokens"]
    pooled = total / result["all"]["supervised_tokens"]
    assert result["all"]["loss"] == pytest.approx(pooled) and result["all"]["conversations"] == 17
    assert result["all"]["generated_tokens"] == a["generated_tokens"] + b["generated_tokens"] > 17
    assert result["all"]["tokens_per_second"] > 0
    assert "dropped: 1" in capsys.readouterr().out


def test_sources_of_one_set(evaluate, tiny, questions):
    both = f"data.sources=[{{path: {questions}/a.jsonl}},{{path: {questions}/b.jsonl, weight: 2}}]"
    result = evaluate(tiny, PAIRS, both, "data.on_error=skip")
    found = result["datasets"]["data"]
    assert {name: part["conversations"] for name, part in found["sources"].items()} == {"0": 12, "1": 5}


def test_validation_split_is_that_of_training(evaluate, tiny, questions):
    words = [PAIRS, f"data.path={questions / 'a.jsonl'}", "data.validation_fraction=0.25"]
    held_out = evaluate(tiny, *words)["datasets"]["a"]
    rest = evaluate(tiny, *words, "evaluate.split=train")["datasets"]["a"]
    assert held_out["split"] == "validation" and held_out["conversations"] == 3 and rest["conversations"] == 9
    whole = evaluate(tiny, PAIRS, f"data.path={questions / 'a.jsonl'}")["datasets"]["a"]
    parts = [part["loss"] * part["supervised_tokens"] for part in (held_out, rest)]
    assert sum(parts) == pytest.approx(whole["loss"] * whole["supervised_tokens"], rel=1e-9)


def no_number(answer: str, reference: str) -> float:
    """A metric that returns none."""
    return math.nan


def test_a_metric_without_a_number(evaluate, tiny, questions, monkeypatch, capsys):
    monkeypatch.setenv("POSTTRAIN_ALLOW_TARGETS", "test_evaluate")
    metric = ["metric=function", "metric._target_=test_evaluate.no_number", "evaluate.max_new_tokens=2"]
    with pytest.raises(SystemExit):
        evaluate(tiny, PAIRS, f"data.path={questions / 'a.jsonl'}", *metric)
    assert "metric: returned NaN for the answer" in capsys.readouterr().err


def score(answer: str, reference: str, factor: float = 1.0) -> float:
    """A metric of the user's."""
    return factor * (len(answer) + len(reference))


def test_scores_of_answers(evaluate, tiny, questions, monkeypatch):
    """Answers in batches are those of one at a time; exact match and a function see the same ones."""
    words = [PAIRS, f"data.path={questions / 'a.jsonl'}", "evaluate.max_new_tokens=6"]
    single = evaluate(tiny, *words, "metric=exact_match", "evaluate.batch_size=1")
    monkeypatch.setenv("POSTTRAIN_ALLOW_TARGETS", "test_evaluate")
    mine = evaluate(tiny, *words, "metric=function", "metric._target_=test_evaluate.score", "+metric.factor=2")
    assert [line["answer"] for line in mine["lines"]] == [line["answer"] for line in single["lines"]]
    assert [line["reference"] for line in mine["lines"]] == [f"it is {i}" for i in range(12)]
    found = mine["datasets"]["a"]
    assert found["score"] == pytest.approx(sum(score(x["answer"], x["reference"], 2) for x in mine["lines"]) / 12)
    assert found["answers"] == 12 and found["categories"]["sum"]["answers"] == 4
    assert single["datasets"]["a"]["score"] == 0


def test_a_model_that_answers_scores(evaluate, tiny, questions, tmp_path, monkeypatch, capsys):
    """A few hundred steps of plain training on the answer that all questions have: the score goes from 0 to 1."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = tmp_path / "same.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"q {i}", "completion": "so: 42"}) + "\n" for i in range(4)))
    words = [
        PAIRS,
        f"data.path={path}",
        "metric=exact_match",
        'metric.extract="so: (\\d+)"',
        "evaluate.max_new_tokens=9",
    ]
    assert evaluate(tiny, *words)["datasets"]["same"]["score"] == 0
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny), AutoTokenizer.from_pretrained(tiny)
    texts = [f"<|im_start|>user\nq {i}<|im_end|>\n<|im_start|>assistant\nso: 42<|im_end|>" for i in range(4)]
    batch = torch.tensor(tokenizer(texts)["input_ids"])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        model(batch, labels=batch).loss.backward()
        optimizer.step()
    model.save_pretrained(tmp_path / "trained")
    tokenizer.save_pretrained(tmp_path / "trained")
    phases = []
    monkeypatch.setattr(working, "phase", lambda name, done=0, total=0, unit="": phases.append((name, done, unit)))
    capsys.readouterr()
    result = evaluate(tmp_path / "trained", *words)
    same = result["datasets"]["same"]
    assert same["score"] == 1 and all(line["stopped"] for line in result["lines"])
    length = len(tokenizer("so: 42<|im_end|>")["input_ids"])
    assert same["generated_tokens"] == 4 * length
    assert 4 * length / same["tokens_per_second"] == pytest.approx(same["seconds"]["generating"], abs=0.001)
    assert same["seconds"]["generating"] <= same["seconds"]["answers"]
    assert f"same: 4 answers of {4 * length} tokens in " in capsys.readouterr().out
    _, done, unit = next(phase for phase in reversed(phases) if phase[0] == "same: answers")
    assert done == length and unit.startswith(f"of at most 9 tokens, prompts 1 to 4 of 4, {4 * length} tokens in all, ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "data: choose what to evaluate on"),
        (["model.path=DIR", PAIRS, "data.path=x"], "the model to evaluate is the first argument"),
        (['evaluate.datasets={x:"data=alpaca model.path=DIR"}'], "the model to evaluate is the first argument"),
        (["data=alpca", "data.path=x"], "did you mean `alpaca`"),
        ([PAIRS, "data.path=DIR/none.jsonl"], "there is no such file"),
        ([PAIRS, "data.path=DIR/b.jsonl"], "line 6"),
        ([PAIRS, "data.path=DIR/a.jsonl", "evaluate.split=validation"], "no validation split"),
        ([PAIRS, "data.path=DIR/a.jsonl", "evaluate.group_by=kind"], "`evaluate.group_by=kind`: no row has such a"),
        ([PAIRS, "data.path=DIR/a.jsonl", "evaluate.limit=0"], "must be at least 1"),
        ([PAIRS, "data.path=DIR/a.jsonl", "evaluate.spilt=train"], "did you mean `evaluate.split`"),
        ([PAIRS, "data.path=DIR/a.jsonl", "metric=exact_match", 'metric.extract="("'], "not a regular expression"),
        ([PAIRS, "data.path=DIR/a.jsonl", "metric=function"], "metric._target_"),
        ([PAIRS, "data.path=DIR/a.jsonl", "metric=function", "metric._target_=os.system"], "not a target"),
        (['evaluate.datasets={x:"data=alpaca data.pth=1"}'], "evaluate.datasets.x: `data.pth`"),
    ],
)
def test_wrong_words(evaluate, tiny, questions, words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        evaluate(tiny, *(word.replace("DIR", str(questions)) for word in words))
    err = capsys.readouterr().err
    assert stop.value.code == 2 and message in err and "Traceback" not in err, err


def test_models_that_are_none(evaluate, tiny, questions, tmp_path, capsys):
    """A missing directory, a run without a result, a half-written model, an adapter of another model."""
    import torch
    from safetensors.torch import save_file

    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("model: 1\n")
    half = tmp_path / "half"
    shutil.copytree(tiny, half)
    weights = (half / "model.safetensors").read_bytes()
    (half / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    other = tmp_path / "other"
    other.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "base_model_name_or_path": str(tiny)}
    (other / "adapter_config.json").write_text(json.dumps(config))
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    pair = {f"{name}A.weight": torch.zeros(2, 48), f"{name}B.weight": torch.zeros(48, 2)}
    save_file(pair, other / "adapter_model.safetensors")
    (tmp_path / "gone").mkdir()
    (tmp_path / "gone" / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "/none"}))
    (tmp_path / "empty").mkdir()
    sweep = tmp_path / "sweep"
    sweep.mkdir()
    (sweep / "multirun.yaml").write_text("hydra: {}")
    data = [PAIRS, f"data.path={questions / 'a.jsonl'}"]
    for what, message in (
        (tmp_path / "none", "no such directory"),
        (tmp_path / "empty", "is not a run directory"),
        (sweep, f"{sweep}: is a sweep; give one of its trials: {sweep}/NAME"),
        (run, "not the configuration of a run"),
        (half, "cut short"),
        (other, "trained on another model"),
        (tmp_path / "gone", "no such directory; write its place as base_model_name_or_path"),
    ):
        with pytest.raises(SystemExit) as stop:
            evaluate(what, *data)
        err = capsys.readouterr().err
        assert stop.value.code == 2 and message in err and "Traceback" not in err, err


def test_exact_match():
    from posttrain.evaluate import ExactMatch

    assert ExactMatch()(" a b\n", "a b") == 1 and ExactMatch()("a", "A") == 0
    assert ExactMatch(ignore_case=True)("a", "A") == 1
    number = ExactMatch(extract=r"#### (-?[\d,]+)")
    assert number("first #### 1, then #### 42", "it is #### 42") == 1
    assert number("no answer", "it is #### 42") == 0 and number("none", "neither") == 0
    assert ExactMatch(extract=r"\d+")("7 or 8", "8") == 1
    either = ExactMatch(extract="Answer: (.+)", ignore_case=True)
    assert either("Answer: Yes", "Answer: Yes") == either("so ANSWER: yes ", "answer: YES") == 1
    assert either("Answer: Yes", "Answer: No") == either("Yes", "Answer: Yes") == 0
    assert ExactMatch(extract="Answer: (.+)")("so answer: Yes", "Answer: Yes") == 0
    assert either("Answer: 42", " 42 ") == 1 and either("42", "42") == 0  # a bare reference
    some = ExactMatch(extract=r"\d*")
    assert some("7 apples", "7") == 1 and some("7 apples", "8 apples") == 0 and some("none", "none") == 0
    assert ExactMatch(extract="A: (\\d+)|B")("A: 7, B", "A: 7") == 1


def test_soft_capped_attention(tmp_path):
    """Gemma 2's scores: as transformers' eager attention has them; its usual one leaves the cap out."""
    import torch
    from families import save_random
    from tiny_tokenizer import byte_tokenizer
    from transformers import AutoModelForCausalLM

    from posttrain.generate.live_model import load_model

    save_random("gemma2", tmp_path, vocab_size=288)
    byte_tokenizer().save_pretrained(tmp_path)
    tokens = torch.arange(40)[None]
    logits = {}
    for attention in ("eager", "sdpa"):
        reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation=attention)
        logits[attention] = reference.eval()(tokens).logits
    model, _ = load_model(tmp_path, "float32")
    found = model(tokens.to(model.device)).logits.cpu()
    torch.testing.assert_close(found, logits["eager"], rtol=1e-4, atol=1e-4)
    assert (found - logits["sdpa"]).abs().max() > 1e-2
