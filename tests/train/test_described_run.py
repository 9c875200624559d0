"""The first lines of a run: what is trained, and what a person should know of it."""

from types import SimpleNamespace

from omegaconf import OmegaConf

from posttrain.spec.epochs import Epoch
from posttrain.spec.schedule import Schedule
from posttrain.train.metrics import describe


def lines(rows, steps, batch, notes=(), unread=None, schedule=None, dropped=None, validation_rows=1, truncated=0):
    """The lines of a run of `steps` over packed rows."""
    split = {"conversations": rows, "tokens": 100, "supervised_share": 0.5, "packing_efficiency": 1.0}
    report = {
        "train": split,
        "unit": "conversation",
        "row_unit": "conversation",
        "rows": {"unread": unread or {}, "dropped": dropped or {}, "truncated": truncated},
        "notes": list(notes),
    }
    epoch = Epoch(rows, batch)
    run = SimpleNamespace(
        groups=SimpleNamespace(peft=None),
        on_gpu=False,
        splits=SimpleNamespace(report=report, train=range(rows)),
        settings=SimpleNamespace(global_batch_size=batch, seq_length=64),
        config=OmegaConf.create({"model": {"path": "a"}}),
        spec=SimpleNamespace(precision="fp32"),
        validation_rows=validation_rows,
        steps=steps,
        epoch=epoch,
        schedule=schedule or Schedule("constant", 1e-3, 0.0, steps, 0.0, steps),
    )
    return describe(run)


def test_the_steps_of_an_epoch_are_said():
    assert lines(100, 25, 4)[-2] == "25 steps: 1.00 epochs of 25 steps of 4 rows"
    assert lines(5, 3, 4)[-2] == "3 steps: 1.80 epochs of 2 steps of 4 rows, the last of 1"
    *_, steps, _, note = lines(3, 2, 32)
    assert steps == "2 steps: 2.00 epochs of 1 step of 3 rows"
    assert note == "[yellow]trainer.global_batch_size=32: there are 3 rows, so every step has all of them[/]"
    assert lines(1, 7, 1)[-2] == "7 steps: 7.00 epochs of 1 step of 1 row"


def test_what_is_not_in_the_text_is_said():
    """Names come from the data: nothing in them is markup."""
    *_, note, field = lines(4, 1, 4, ["left out: [bold]x"], {"mood[red]": 1234})
    assert note == r"[yellow]left out: \[bold]x[/]"
    assert field == r"[yellow]not in the text: mood\[red], in 1,234 conversations[/]"


def test_what_is_left_out_and_why_nothing_is_validated_is_said():
    *_, truncated, dropped, validation = lines(
        4, 1, 4, dropped={"data.where is false": 40}, validation_rows=0, truncated=3
    )
    assert truncated == "[yellow]truncated to trainer.seq_length=64: 3 conversations[/]"
    assert dropped == "[yellow]left out, data.where is false: 40 conversations[/]"
    assert validation.startswith("no validation loss: nothing is held out; data.validation_fraction=0.1")


def test_the_learning_rate_is_said():
    schedule = Schedule("WSD", 1e-3, 0.0, 20, 1.0, 20, 19, notes=("shortened",))
    rate, note = lines(20, 20, 1, schedule=schedule)[-2:]
    assert rate == "learning rate 0.0005 at step 1, 0.001 at step 2, 5.26e-05 at step 20 (WSD)"
    assert note == "[yellow]shortened[/]"
