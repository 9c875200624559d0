"""What trackers hold of a run that was resumed: each step once, in one run."""

import pytest

from posttrain.train.metrics import answers_at, points_at
from posttrain.train.trackers import Resumed, TensorBoard, TrackedRun, Wandb
from posttrain.utils import rundir


def test_tensorboard_has_each_step_once(tmp_path):
    """A process gets to step 5, its last checkpoint is of step 3: what it has written after that is hidden."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.plugin_event_accumulator")  # its page's
    first = TensorBoard()
    first.start(TrackedRun(tmp_path, "run", {}))
    first.log(0, {"val/loss": 9.0})
    for step in range(1, 6):
        first.log(step, {"train/loss": 1.0 / step})
    first.log(3, {"val/loss": 8.0})
    first.table(3, "samples", [{"prompt": "p", "answer": "a"}])
    first.table(5, "samples", [{"prompt": "p", "answer": "lost"}])
    first.writer.flush()  # it is killed

    lines = '{"step": 3, "time": 1.0, "loss": 0.25, "batch": "00c0ffee"}\n{"step": 3, "time": 2.0, "val_loss": 8.0}\n'
    answers = '{"step": 2, "prompt": "p", "answer": "b"}\n{"step": 3, "prompt": "p", "answer": "a"}\n'
    second = TensorBoard()
    resumed = Resumed(3, points_at(3, lines), answers_at(3, answers))
    second.start(TrackedRun(tmp_path, "run", {}, resumed=resumed))
    for step in range(4, 7):
        second.log(step, {"train/loss": 2.0 / step})
    second.finish({})

    events = reader.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()

    def points(name):
        return [(event.step, event.tensor_proto.float_val[0]) for event in events.Tensors(name)]

    assert [step for step, _ in points("train/loss")] == [1, 2, 3, 4, 5, 6]
    assert [value for _, value in points("train/loss")] == pytest.approx([1, 1 / 2, 1 / 4, 2 / 4, 2 / 5, 2 / 6])
    assert points("val/loss") == [(0, 9.0), (3, 8.0)]
    numbers_and_answers = {"train/loss", "val/loss", "samples/0/text_summary"}
    assert {tag for tag in events.Tags()["tensors"] if tag.partition("/")[0] not in ("config", "_hparams_")} == (
        numbers_and_answers
    )
    assert [event.step for event in events.Tensors("samples/0/text_summary")] == [3]


def test_wandb_continues_under_one_id(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.chdir(tmp_path)
    ids = []
    for resumed in (None, Resumed(3, [], []), Resumed(5, [], []), None):
        tracker = Wandb(mode="offline")
        tracker.start(TrackedRun(tmp_path, "run", {}, resumed=resumed))
        tracker.log(1, {"loss": 1.0})
        ids.append(tracker.run.id)
        tracker.finish({})
    assert ids[0] == ids[1] == ids[2] != ids[3]  # the last began anew
    parts = [path.name.split("-") for path in (tmp_path / "wandb").glob("offline-run-*")]
    assert len(parts) == 4 and all(set(ids) & set(part) for part in parts)


@pytest.mark.parametrize("content", [{"id": "../../x"}, {"id": 7}, ["a"], {}])
def test_an_id_that_is_none(content, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.chdir(tmp_path)
    rundir.write_json(tmp_path, "wandb.json", content)
    tracker = Wandb(mode="disabled")
    tracker.start(TrackedRun(tmp_path, "run", {}, resumed=Resumed(3, [], [])))
    tracker.finish({})
    assert rundir.read_json(tmp_path, "wandb.json")["id"].isalnum()
