"""What trackers have written, read back by the libraries that they are for: curves, tables, configurations, sweeps."""

import json

import pytest

from posttrain.config.composition import compose
from posttrain.config.instantiate import built
from posttrain.errors import UserError
from posttrain.spec import checks
from posttrain.train.trackers import Csv, MLflow, Resumed, TensorBoard, TrackedRun, Trackio
from posttrain.train.trackers.tracker import sweep_of
from posttrain.utils import rundir

CONFIG = {"model": {"path": "a/b"}, "optimizer": {"lr": 1e-4}, "peft": {"rank": 8, "alpha": None}, "seed": 1}
MULTIRUN = "hydra:\n  overrides:\n    task: [trainer.max_steps=4, 'peft.rank=4,8', 'data=alpaca,dolly']\n"
MULTIRUN += "  sweeper:\n    params:\n      optimizer.lr: interval(1e-5, 1e-3)\n"


@pytest.fixture
def trial(tmp_path):
    """A trial of a sweep, as Hydra leaves it."""
    directory = tmp_path / "my sweep" / "lr=0.0001,rank=8"
    (directory / ".hydra").mkdir(parents=True)
    (directory.parent / "multirun.yaml").write_text(MULTIRUN)
    overrides = ["trainer.max_steps=4", "peft.rank=8", "data=dolly", "optimizer.lr=0.0001"]
    (directory / ".hydra/overrides.yaml").write_text(json.dumps(overrides))
    return TrackedRun(directory, "name", CONFIG, *sweep_of(directory))


def test_a_trial_knows_its_sweep(trial, tmp_path):
    assert trial.group == "my sweep"
    assert trial.swept == {"peft.rank": 8, "data": "dolly", "optimizer.lr": 0.0001}
    assert sweep_of(tmp_path) == (None, {})
    assert TrackedRun(tmp_path, "run", CONFIG).recorded_config == CONFIG


def test_tensorboards_table_of_hyperparameters(trial):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from tensorboard.plugins.hparams import metadata

    tracker = TensorBoard()
    tracker.start(trial)
    tracker.log(1, {"train/loss": 2.0})
    tracker.finish({})
    events = reader.EventAccumulator(str(trial.directory / "tensorboard")).Reload()
    contents = events.summary_metadata
    begun = metadata.parse_session_start_info_plugin_data(contents[metadata.SESSION_START_INFO_TAG].plugin_data.content)
    values = {key: value.number_value or value.string_value for key, value in begun.hparams.items()}
    assert values == {"model.path": "a/b", "optimizer.lr": 1e-4, "peft.rank": 8, "seed": 1, "data": "dolly"}
    experiment = metadata.parse_experiment_plugin_data(contents[metadata.EXPERIMENT_TAG].plugin_data.content)
    assert {info.name.tag for info in experiment.metric_infos} == {"val/loss", "train/loss"}
    (text,) = events.Tensors("config/text_summary")
    assert json.loads(text.tensor_proto.string_val[0])["swept"]["data"] == "dolly"


def test_csv(tmp_path):
    """Columns that come later, and a resumed run: each point once, in the order of pandas' reader."""
    pandas = pytest.importorskip("pandas")
    tracker = built(compose(["logger=csv"]).logger.csv)
    assert isinstance(tracker, Csv)
    tracker.check()
    tracker.start(TrackedRun(tmp_path, "run", CONFIG))
    tracker.log(0, {"val/loss": 3.0})
    for step in (1, 2, 3):
        tracker.log(step, {"train/loss": 1 / step, "train/epoch": 0.5})
    tracker.table(3, "samples", [{"prompt": "p", "answer": "=1+1"}])  # killed; the checkpoint is of step 2
    resumed = Resumed(2, [{"train/loss": 1 / 2, "train/epoch": 0.5}], [])
    tracker = Csv()
    tracker.start(TrackedRun(tmp_path, "run", CONFIG, resumed=resumed))
    tracker.log(3, {"train/loss": 0.25, "train/epoch": 0.75})
    tracker.log(3, {"val/loss": 2.0})
    assert tracker.finish({}) == f"csv: {tmp_path}/metrics.csv"
    table = pandas.read_csv(tmp_path / "metrics.csv")
    assert list(table.columns) == ["step", "val/loss", "train/loss", "train/epoch"]
    assert list(table["step"]) == [0, 1, 2, 3, 3]
    assert list(table["train/loss"].dropna()) == [1.0, 0.5, 0.25] and list(table["val/loss"].dropna()) == [3.0, 2.0]


@pytest.mark.nightly  # its import takes ten seconds
def test_mlflow(trial, monkeypatch):
    """Read back by mlflow's own client from the files."""
    pytest.importorskip("mlflow")
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    tracker = built(compose(["logger=mlflow"]).logger.mlflow)
    tracker.check()
    tracker.start(trial)
    tracker.log(1, {"train/loss": 2.0, "perf/mfu": 0.4})
    tracker.table(1, "samples", [{"prompt": "p", "answer": "a"}])
    tracker = MLflow()
    resumed = TrackedRun(trial.directory, "name", CONFIG, trial.group, trial.swept, Resumed(1, [], []))
    tracker.start(resumed)
    tracker.log(2, {"train/loss": 1.5})
    tracker.table(2, "samples", [{"prompt": "p", "answer": "b"}])
    said = tracker.finish({"val_loss_after": 1.75})
    assert said.startswith(f"mlflow: kept in {trial.directory / 'mlruns'}; to look at it: mlflow ui ")
    client = tracker.client
    experiment = client.get_experiment_by_name("posttrain")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status, run.data.tags["sweep"]) == ("name", "FINISHED", "my sweep")
    assert run.data.params["optimizer.lr"] == "0.0001" and run.data.params["swept.data"] == "dolly"
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(point.step, point.value) for point in history] == [(1, 2.0), (2, 1.5)]
    (file,) = (trial.directory / "mlruns").rglob("samples.json")
    assert json.loads(file.read_text()) == {
        "columns": ["step", "prompt", "answer"],
        "data": [[1, "p", "a"], [2, "p", "b"]],
    }
    assert run.data.tags["summary.val_loss_after"] == "1.75"


def test_trackio(trial, monkeypatch):
    """Read back by trackio's own storage."""
    pytest.importorskip("trackio")
    from trackio import sqlite_storage

    for module in ("trackio", "trackio.utils", "trackio.sqlite_storage"):
        monkeypatch.setattr(f"{module}.TRACKIO_DIR", trial.directory / "trackio", raising=False)
    monkeypatch.delenv("TRACKIO_SPACE_ID", raising=False)
    tracker = built(compose(["logger=trackio", "logger.trackio.project=mine"]).logger.trackio)
    tracker.check()
    tracker.start(trial)
    tracker.log(1, {"train/loss": 2.0})
    tracker.table(1, "samples", [{"prompt": "p", "answer": "a"}])
    tracker.finish({})
    tracker = Trackio(project="mine")
    tracker.start(TrackedRun(trial.directory, "name", CONFIG, trial.group, trial.swept, Resumed(1, [], [])))
    tracker.log(2, {"train/loss": 1.5})
    said = tracker.finish({})
    assert said == "trackio: kept on this machine; to look at it: trackio show --project mine"
    storage = sqlite_storage.SQLiteStorage
    assert storage.get_runs("mine") == ["name"]
    logs = storage.get_logs("mine", "name")
    assert [(log["step"], log["train/loss"]) for log in logs if "train/loss" in log] == [(1, 2.0), (2, 1.5)]
    (table,) = [log["samples"] for log in logs if "samples" in log]
    assert table["_value"] == [{"prompt": "p", "answer": "a"}]
    config = storage.get_run_config("mine", "name")
    assert config["swept"]["data"] == "dolly" and config["_Group"] == "my sweep"


@pytest.mark.parametrize("name", ["mlflow", "trackio"])
def test_a_missing_package_is_found_out_before_a_run(name, monkeypatch):
    monkeypatch.setattr("posttrain.train.trackers.tracker.find_spec", lambda package: None)
    with pytest.raises(UserError, match=f"logger={name}: {name} is not installed; run `uv sync --extra {name}`"):
        checks.check_trackers(compose([f"logger=[csv,{name}]"]))


def test_a_password_is_refused(monkeypatch):
    monkeypatch.setattr("posttrain.train.trackers.tracker.find_spec", lambda package: True)
    with pytest.raises(UserError, match=r"tracking_uri: has a password in it; .* MLFLOW_TRACKING_PASSWORD"):
        MLflow(tracking_uri="https://me:secret@example.org").check()


def test_what_trackers_write_is_a_runs_own(tmp_path):
    (tmp_path / "mlruns").symlink_to(tmp_path.parent)
    with pytest.raises(UserError, match="mlruns: is a link"):
        rundir.check(tmp_path)
