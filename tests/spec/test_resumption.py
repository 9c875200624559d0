"""Files of a run that resumes: moved ones are taken where their content is the same, others are refused by name."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import save_file

from posttrain.checkpoint import directories, resume
from posttrain.checkpoint.progress import Progress
from posttrain.config import frozen
from posttrain.config.composition import compose
from posttrain.errors import UserError
from posttrain.spec import inputs, resumption
from posttrain.utils.atomic_files import write_text


def row(text):
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": text}]
    return json.dumps({"messages": turns}) + "\n"


@pytest.fixture
def place(tmp_path):
    """A folder with a model, rows to train on and to validate on, and a template."""
    folder = tmp_path / "place"
    (folder / "model").mkdir(parents=True)
    (folder / "model/config.json").write_text("{}")
    (folder / "model/tokenizer_config.json").write_text("{}")
    save_file({"a": np.zeros((4, 4), np.float32)}, folder / "model/model.safetensors")
    (folder / "rows.jsonl").write_text(row("yes"))
    (folder / "more.jsonl").write_text(row("no"))
    (folder / "validation.jsonl").write_text(row("perhaps"))
    (folder / "own.jinja").write_text("{{ messages }}")
    return folder


def configuration(place, *words):
    return compose([
        "model=hf", f"model.path={place / 'model'}", "data=messages", f"data.path={place / 'rows.jsonl'}",
        f"data.validation_path={place / 'validation.jsonl'}", "template=custom", f"template.file={place / 'own.jinja'}",
        f"cache_dir={place.parent / 'cache'}", "trainer.max_steps=4", *words,
    ])  # fmt: skip


def save(run_dir, cfg, digests):
    """A checkpoint as far as this project's own files go."""
    partial = directories.directory(run_dir / "checkpoints" / directories.PARTIAL, 2)
    partial.mkdir(parents=True)
    write_text(partial / resume.CONFIG, frozen.text(cfg))
    (partial / "train_state.pt").write_bytes(b"state")
    Progress(rows=9, digests=digests).write(partial)
    directories.finish(run_dir / "checkpoints", 2)


def saved(place, *words):
    """The directory of a run that has saved, with what is in `place`."""
    cfg = configuration(place, *words)
    run_dir = place.parent / "run"
    save(run_dir, cfg, inputs.digests(cfg))
    return run_dir


def sources(place, weight=1.0):
    two = [f"{{path: {place / 'rows.jsonl'}, weight: {weight}}}", f"{{path: {place / 'more.jsonl'}}}"]
    return ["data.path=null", f"data.sources=[{','.join(two)}]"]


def test_everything_was_moved(place):
    run_dir = saved(place)
    moved = place.rename(place.parent / "moved")
    resumption.check(configuration(moved), run_dir)


def test_sources_were_moved(place):
    run_dir = saved(place, *sources(place, 2.0))
    moved = place.parent / "moved"
    shutil.copytree(place, moved)
    resumption.check(configuration(place, *sources(moved, 2.0)), run_dir)
    with pytest.raises(UserError, match=r"was trained with another configuration.*\n  data\.sources: "):
        resumption.check(configuration(place, *sources(moved, 3.0)), run_dir)


@pytest.mark.parametrize(
    ("key", "file"),
    [
        ("data.path", "rows.jsonl"),
        ("data.validation_path", "validation.jsonl"),
        ("template.file", "own.jinja"),
        ("model.path", "model/model.safetensors"),
        ("model.path", "model/tokenizer_config.json"),
    ],
)
def test_another_content_elsewhere(place, key, file):
    run_dir = saved(place)
    moved = place.parent / "moved"
    shutil.copytree(place, moved)
    (moved / file).write_bytes((moved / file).read_bytes() + b" ")
    with pytest.raises(UserError) as refused:
        resumption.check(configuration(moved), run_dir)
    lines = str(refused.value).splitlines()
    named = f"  {key}: {place} -> {moved}".split(" -> ")
    told = [line for line in lines if line.startswith(named[0]) and named[1] in line]
    assert len(told) == 1
    assert told[0].endswith(", whose content is another")
    assert "was trained with another configuration" in lines[0]


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("rows.jsonl", "the training rows of data.path changed"),
        ("validation.jsonl", "the rows of data.validation_path changed"),
        ("model/model.safetensors", "config.json or the weights of model.path changed"),
    ],
)
def test_another_content_at_the_same_place(place, file, words):
    """Known before the ranks start, which would leave a finished run as a failed one."""
    run_dir = saved(place)
    resumption.check(configuration(place), run_dir)
    (place / file).write_bytes((place / file).read_bytes() + b" ")
    with pytest.raises(UserError, match=f"{words} since it was saved"):
        resumption.check(configuration(place), run_dir)


def test_weights_may_change_where_the_checkpoint_has_them_all(place):
    run_dir = saved(place, "peft=none")
    (place / "model/model.safetensors").write_bytes(b" ")
    resumption.check(configuration(place, "peft=none"), run_dir)


def test_what_may_change_is_not_taken_for_another_content(place):
    run_dir = saved(place)
    resumption.check(configuration(place, "trainer.validation_batches=1"), run_dir)


def test_a_checkpoint_that_does_not_say_what_it_read(place):
    run_dir = place.parent / "run"
    save(run_dir, configuration(place), {})
    resumption.check(configuration(place), run_dir)
    moved = place.parent / "moved"
    shutil.copytree(place, moved)
    with pytest.raises(UserError, match=r"\n  data\.path: .*rows\.jsonl -> .*moved/rows\.jsonl\n"):
        resumption.check(configuration(moved), run_dir)


def test_other_names_on_a_hub_are_other_contents(place):
    """What lies elsewhere has no digest of its content here."""
    model = ["model.path=someone/model", "template=model"]
    run_dir = saved(place, *model)
    with pytest.raises(UserError, match=r"\n  model\.path: someone/model -> someone/other$"):
        resumption.check(configuration(place, "model.path=someone/other", "template=model"), run_dir)
