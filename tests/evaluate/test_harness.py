"""Tasks of lm-eval: a task file of one's own, its data beside it, a random model, no network."""

import json

import pytest

from posttrain.errors import UserError

TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: "{data}"}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: {target}
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture
def tasks(tmp_path):
    """A folder with a task, and one whose right answers come from a function beside it."""
    pytest.importorskip("lm_eval")
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [{"question": f"{i} is", "choices": [" hello", " im"], "label": i % 2} for i in range(6)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, target in (("tiny_choice", "label"), ("tiny_function", "!function own.target")):
        text = TASK.format(name=name, data=folder / "rows.jsonl", target=target)
        (folder / f"{name}.yaml").write_text(text)
    (folder / "own.py").write_text("def target(row):\n    return row['label']\n")
    return folder


def test_tasks_from_a_folder(evaluate, tiny, tasks, monkeypatch, tmp_path, capsys):
    """The accuracy is what the model's own log-likelihoods say, and code of the folder runs once it is trusted."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    words = ["lm_eval.tasks=[tiny_choice,tiny_function]", f"lm_eval.include_path={tasks}"]
    result = evaluate(tiny, *words, "lm_eval.trust_include_path=true")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny), AutoTokenizer.from_pretrained(tiny)
    right = 0
    for row in map(json.loads, (tasks / "rows.jsonl").read_text().splitlines()):
        found = []
        for choice in row["choices"]:
            before, after = (tokenizer(text)["input_ids"] for text in (row["question"], choice))
            with torch.no_grad():
                logits = model(torch.tensor([before + after])).logits[0].log_softmax(-1)
            found.append(sum(logits[len(before) - 1 + i, token].item() for i, token in enumerate(after)))
        right += found.index(max(found)) == row["label"]
    assert result["lm_eval"]["tiny_choice"]["acc,none"] == right / 6
    assert result["lm_eval"]["tiny_choice"] == result["lm_eval"]["tiny_function"]
    assert result["lm_eval"]["tiny_choice"]["samples"] == 6 and result["datasets"] == {}
    assert "tiny_function" in capsys.readouterr().out


def test_refused_before_a_model_is_loaded(evaluate, tiny, tasks, monkeypatch, capsys):
    """Task files are code: without a word of trust they are not read. An unknown task, a missing package."""
    words = ["lm_eval.tasks=[tiny_choice]", f"lm_eval.include_path={tasks}"]
    for more, message in (
        ([], "lm_eval.trust_include_path=true"),
        (["lm_eval.include_path=none", "lm_eval.trust_include_path=true"], "no such folder"),
    ):
        with pytest.raises(SystemExit) as stop:
            evaluate(tiny, *words, *more)
        assert stop.value.code == 2 and message in capsys.readouterr().err
    from posttrain.config.composition import compose
    from posttrain.evaluate import settings

    file = compose([*words, "lm_eval.trust_include_path=true"], "evaluate").lm_eval  # as if a file had said so
    with pytest.raises(UserError, match="to the command line"):
        settings.check_lm_eval(file, words)
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "lm_eval" else find(name, *a))
    with pytest.raises(SystemExit):
        evaluate(tiny, *words, "lm_eval.trust_include_path=true")
    assert "uv sync --extra eval" in capsys.readouterr().err
