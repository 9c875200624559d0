"""What trackers are told, and read back from what they have written, with the real libraries."""

import json

import pytest

from posttrain.config.composition import compose
from posttrain.config.instantiate import built
from posttrain.errors import UserError
from posttrain.spec import checks
from posttrain.train.metrics import tracked
from posttrain.train.trackers import TensorBoard, TrackedRun, Wandb

wandb = pytest.importorskip("wandb")
VARIABLES = ("MODE", "PROJECT", "ENTITY", "RUN_GROUP", "TAGS", "API_KEY", "BASE_URL", "IDENTITY_TOKEN_FILE")


@pytest.fixture(autouse=True)
def nobody(tmp_path, monkeypatch):
    """A person without an account, settings or variables of wandb's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name in VARIABLES:
        monkeypatch.delenv(f"WANDB_{name}", raising=False)
    wandb.teardown()
    yield
    wandb.teardown()


def recorded(run_dir):
    """The run's own record and its points, of the file that `wandb sync` sends."""
    from wandb.proto import wandb_internal_pb2
    from wandb.sdk.internal.datastore import DataStore

    wandb.teardown()  # ends the process that writes
    (file,) = run_dir.glob("wandb/offline-run-*/*.wandb")
    store = DataStore()
    store.open_for_scan(str(file))
    run, points = None, []
    content = store.scan_data()
    while content is not None:
        record = wandb_internal_pb2.Record()
        record.ParseFromString(content)
        if record.WhichOneof("record_type") == "run":
            run = record.run
        if record.WhichOneof("record_type") == "history":
            points.append({item.key or "/".join(item.nested_key): item.value_json for item in record.history.item})
        content = store.scan_data()
    return run, points


def test_wandbs_variables_win_over_the_defaults(tmp_path, monkeypatch):
    for name, value in {"MODE": "offline", "PROJECT": "p", "RUN_GROUP": "g", "TAGS": "a,b", "ENTITY": "team"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    cfg = compose(["logger=wandb"])
    checks.check_trackers(cfg)
    tracker = built(cfg.logger.wandb)
    tracker.start(TrackedRun(tmp_path, "my run", {"seed": 1}))
    tracker.log(1, tracked({"loss": 2.0, "mfu": 0.4}))
    tracker.log(2, tracked({"loss": 1.5, "val_loss": 1.75}))
    said = tracker.finish({"val_loss_after": 1.75})
    run, points = recorded(tmp_path)
    assert (run.project, run.entity, run.run_group, list(run.tags)) == ("p", "team", "g", ["a", "b"])
    assert run.display_name == "my run"
    assert [(point.get("train/loss"), point.get("val/loss")) for point in points] == [("2", None), ("1.5", "1.75")]
    assert points[0]["perf/mfu"] == "0.4"
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    assert said == f"wandb: kept in {folder}; to send it: wandb sync {folder}"


def test_the_configuration_wins_over_the_variables(tmp_path, monkeypatch):
    for name, value in {"MODE": "online", "PROJECT": "p", "RUN_GROUP": "g", "TAGS": "a,b"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    tracker = Wandb(project="mine", mode="offline", group="ours", tags=["c"])
    tracker.check()
    tracker.start(TrackedRun(tmp_path, "name", {}))
    tracker.finish({})
    run, _ = recorded(tmp_path)
    assert (run.project, run.run_group, list(run.tags)) == ("mine", "ours", ["c"])


def test_the_defaults(tmp_path):
    tracker = Wandb(mode="offline")
    tracker.start(TrackedRun(tmp_path, "name", {}))
    tracker.finish({})
    run, _ = recorded(tmp_path)
    assert (run.project, run.entity, run.run_group, list(run.tags)) == ("posttrain", "", "", [])


def test_an_account_that_is_missing_is_found_out_before_a_run(monkeypatch):
    with pytest.raises(
        UserError, match=r"no account for https://api\.wandb\.ai: log in .* logger\.wandb\.mode=offline"
    ):
        checks.check_trackers(compose(["logger=wandb"]))
    monkeypatch.setenv("WANDB_MODE", "sometimes")
    with pytest.raises(UserError, match="WANDB_MODE=sometimes: must be one of online, offline, disabled"):
        Wandb().check()
    with pytest.raises(UserError, match=r"logger\.wandb\.mode=offlin: must be one of"):
        Wandb(mode="offlin").check()


@pytest.mark.parametrize("mode", ["offline", "disabled"])
def test_none_is_needed_where_nothing_is_sent(mode):
    Wandb(mode=mode).check()


def test_accounts_that_count(tmp_path, monkeypatch):
    key = "0123456789" * 4
    (tmp_path / "netrc").write_text(f"machine ours.example\n  login user\n  password {key}\n")
    with pytest.raises(UserError, match="no account"):
        Wandb().check()  # it is another host's
    (tmp_path / "netrc").write_text(f"machine api.wandb.ai\n  login user\n  password {key}\n")
    Wandb().check()
    (tmp_path / "netrc").unlink()
    monkeypatch.setenv("WANDB_API_KEY", key)
    Wandb().check()


def test_columns_by_their_names_in_trackers():
    columns = {"loss": 1.0, "lr": 2.0, "val_loss": 3.0, "tokens_per_second": 4.0, "epoch": 5.0}
    assert tracked(columns) == {
        "train/loss": 1.0,
        "train/lr": 2.0,
        "val/loss": 3.0,
        "perf/tokens_per_second": 4.0,
        "train/epoch": 5.0,
    }


def test_tensorboard_has_those_names(tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    tracker = TensorBoard()
    tracker.check()
    tracker.start(TrackedRun(tmp_path, "run", {}))
    tracker.log(1, tracked({"loss": 2.0, "val_loss": 3.0, "mfu": 0.5}))
    assert tracker.finish({}) == f"tensorboard: to look at it: tensorboard --logdir {tmp_path}/tensorboard"
    events = reader.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == {"train/loss", "val/loss", "perf/mfu"}
    assert [(point.step, point.value) for point in events.Scalars("val/loss")] == [(1, 3.0)]


def test_the_name_of_a_run_is_run_name():
    with pytest.raises(UserError, match=r"`logger\.wandb\.name`: unknown key; here it is `run\.name=my_run`"):
        compose(["logger=wandb", "logger.wandb.name=x"])


def test_wandb_groups_the_trials_of_a_sweep(tmp_path):
    """What varies is in the configuration, and the answers are a table."""
    tracker = Wandb(mode="offline")
    tracker.start(TrackedRun(tmp_path, "trial", {"seed": 1}, "my sweep", {"peft.rank": 8}))
    tracker.table(1, "samples", [{"prompt": "p", "answer": "a"}])
    tracker.finish({})
    run, points = recorded(tmp_path)
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert run.run_group == "my sweep" and config["swept"] == {"peft.rank": 8}
    assert any("samples" in name and "table-file" in value for point in points for name, value in point.items())
    (table,) = tmp_path.glob("wandb/offline-run-*/files/media/table/*.json")
    assert json.loads(table.read_text()) == {"columns": ["prompt", "answer"], "data": [["p", "a"]]}
