"""What happens after a step whose numbers are bad: the policy alone, and rows that are left out."""

import json

import pytest

from posttrain.checkpoint.progress import Progress
from posttrain.errors import UserError
from posttrain.train import rollback
from posttrain.train.batches import TrainOrder
from posttrain.train.nonfinite import LEAST, MOST_SKIPPED, WINDOW, NonFinitePolicy


def order(skip=()):
    return TrainOrder(range(10), 4, 25, 7, None, {}, skip)


def policy(tmp_path, name="stop", spike=None, most=2, skip=()):
    rows = order(skip)
    return NonFinitePolicy(
        policy=name,
        spike=spike,
        max_rollbacks=most,
        look=name == "skip",
        global_batch_size=4,
        progress=Progress(),
        run_dir=tmp_path,
        is_first=True,
        order=lambda: rows,
    )


@pytest.mark.parametrize("name", ["loss", "gradient_norm"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_stop(tmp_path, name, value):
    look = policy(tmp_path)
    look.check(1, 0, False, loss=1.0, gradient_norm=2.0)
    rows = ", ".join(str(order().row_at(index)) for index in range(4, 8))
    with pytest.raises(UserError, match=rf"step 2: {name.replace('_', ' ')} is .*rows {rows} of"):
        look.check(2, 4, False, **{name: value})


def test_skip_gives_up_after_some(tmp_path):
    look = policy(tmp_path, "skip")
    for step in range(1, MOST_SKIPPED):
        look.check(step, 4 * step, True, loss=float("nan"))
    look.check(20, 80, False, loss=1.0)
    for step in range(1, MOST_SKIPPED):
        look.check(step, 4 * step, True, loss=float("nan"))
    with pytest.raises(UserError, match=f"{MOST_SKIPPED} updates in a row"):
        look.check(30, 90, True, loss=float("nan"))


def test_a_spike_is_measured_by_the_median_of_the_last(tmp_path):
    look = policy(tmp_path, spike=2.0)
    for step in range(LEAST - 1):
        look.check(step, 0, False, loss=1.0 if step else 50.0)  # too few to say
    look.check(LEAST, 0, False, loss=1.9)
    message = r"loss is 2\.1, 2\.1 times the median 1 of the last 5 \(trainer\.loss_spike_factor=2"
    with pytest.raises(UserError, match=message):
        look.check(LEAST + 1, 0, False, loss=2.1)
    for step in range(100):
        look.check(step, 0, False, loss=1.0 + step / 100)
    assert len(look.progress.losses) == WINDOW


def test_without_a_factor_there_is_no_spike(tmp_path):
    look = policy(tmp_path)
    for loss in [1.0] * 20 + [1e30]:
        look.check(1, 0, False, loss=loss)


def whole_checkpoint(tmp_path, step):
    from posttrain.checkpoint import directories

    root = tmp_path / "checkpoints"
    partial = directories.directory(root / directories.PARTIAL, step)
    partial.mkdir(parents=True)
    (partial / "train_state.pt").write_bytes(b"state")
    directories.finish(root, step)


def test_going_back(tmp_path):
    """To the newest checkpoint; without this batch and the one before, whose update is undone as well."""
    whole_checkpoint(tmp_path, 2)
    look = policy(tmp_path, "rollback")
    # The last two of these places are empty: ten rows are two steps of four and one of two.
    rows = ", ".join(str(order().row_at(index)) for index in range(16, 22))
    with pytest.raises(rollback.RolledBack, match=f"step 6: loss is nan; going back to .* step 2, .* rows {rows} of"):
        look.check(6, 20, False, loss=float("nan"))
    (one,) = rollback.read(tmp_path)
    assert (one["step"], one["to"], one["skip"]) == (6, 2, [16, 20])
    assert rollback.skipped([one]) == [16, 20]


def test_going_back_to_the_step_before_leaves_out_one_batch(tmp_path):
    whole_checkpoint(tmp_path, 5)
    with pytest.raises(rollback.RolledBack):
        policy(tmp_path, "rollback").check(6, 20, True, loss=float("nan"))
    assert rollback.read(tmp_path)[0]["skip"] == [20]


def test_going_back_to_the_beginning(tmp_path):
    with pytest.raises(rollback.RolledBack, match="the beginning"):
        policy(tmp_path, "rollback").check(1, 0, False, gradient_norm=float("inf"))
    assert rollback.read(tmp_path)[0]["to"] == 0


def test_going_back_has_an_end(tmp_path):
    look = policy(tmp_path, "rollback", most=2)
    for skip in ([0], [4]):
        with pytest.raises(rollback.RolledBack):
            look.check(1, 0, False, loss=float("nan"))
        look = policy(tmp_path, "rollback", most=2, skip=skip)
        look.progress.rollbacks = rollback.read(tmp_path)
    with pytest.raises(UserError, match=r"after 2 rollbacks \(trainer\.max_rollbacks\)"):
        look.check(1, 0, False, loss=float("nan"))


def test_rows_that_are_left_out_move_the_others_up():
    plain = [order().row_at(index) for index in range(40)]
    assert [order([8]).row_at(index) for index in range(20)] == plain[:8] + plain[12:24]
    assert [order([4, 8, 20]).row_at(index) for index in range(20)] == plain[:4] + plain[12:20] + plain[24:32]
    assert order([4, 8, 20]).place(8) == 16


def test_what_a_checkpoint_knows_and_what_was_written_since(tmp_path):
    rollback.record(tmp_path, [], 6, 2, "why", [16, 20])
    saved = rollback.read(tmp_path)
    rollback.record(tmp_path, saved, 9, 4, "why", [32])
    assert rollback.merged(saved, rollback.read(tmp_path)) == rollback.read(tmp_path)
    assert rollback.skipped(rollback.read(tmp_path)) == [16, 20, 32]
    assert rollback.read(tmp_path / "elsewhere") == []


def test_progress_of_a_checkpoint_from_before_there_were_rollbacks(tmp_path):
    Progress(tokens=5, losses=[1.0]).write(tmp_path)
    kept = json.loads((tmp_path / "progress.json").read_text())
    del kept["rollbacks"], kept["losses"]
    (tmp_path / "progress.json").write_text(json.dumps(kept))
    progress = Progress()
    progress.read(tmp_path)
    assert (progress.tokens, progress.losses, progress.rollbacks) == (5, [], [])
