"""The first lines of a run: what is trained, and what a person should know of it."""

from types import SimpleNamespace

from omegaconf import OmegaConf

from posttrain.spec.schedule import Schedule
from posttrain.train.metrics import describe


def lines(rows, steps, batch, epochs, notes=(), unread=None, schedule=None):
    """The lines of a run of `steps` over packed rows."""
    split = {"conversations": rows, "tokens": 100, "supervised_share": 0.5, "packing_efficiency": 1.0}
    report = {
        "train": split,
        "unit": "conversation",
        "row_unit": "conversation",
        "rows": {"unread": unread or {}},
        "notes": list(notes),
    }
    run = SimpleNamespace(
        groups=SimpleNamespace(peft=None),
        on_gpu=False,
        splits=SimpleNamespace(report=report, train=range(rows)),
        settings=SimpleNamespace(global_batch_size=batch, seq_length=64),
        config=OmegaConf.create({"model": {"path": "a"}}),
        spec=SimpleNamespace(precision="fp32", epochs=epochs),
        steps=steps,
        schedule=schedule or Schedule("constant", 1e-3, 0.0, steps, 0.0, steps),
    )
    return describe(run)


def test_more_passes_than_asked_for_are_said():
    """Five rows in steps of four are two steps: three rows are trained twice."""
    assert "trainer.epochs=1 becomes 1.60: every step has 4 rows, and there are 5" in lines(5, 2, 4, 1.0)[-1]
    assert lines(100, 25, 4, 1.0)[-2] == "25 steps of 4 rows: 1.00 epochs"
    assert lines(5, 2, 4, None)[-2] == "2 steps of 4 rows: 1.60 epochs"  # steps were asked for


def test_what_is_not_in_the_text_is_said():
    """Names come from the data: nothing in them is markup."""
    *_, note, field = lines(4, 1, 4, None, ["left out: [bold]x"], {"mood[red]": 1234})
    assert note == r"[yellow]left out: \[bold]x[/]"
    assert field == r"[yellow]not in the text: mood\[red], in 1,234 conversations[/]"


def test_the_learning_rate_is_said():
    schedule = Schedule("WSD", 1e-3, 0.0, 20, 1.0, 20, 19, notes=("shortened",))
    rate, note = lines(20, 20, 1, None, schedule=schedule)[-2:]
    assert rate == "learning rate 0.0005 at step 1, 0.001 at step 2, 5.26e-05 at step 20 (WSD)"
    assert note == "[yellow]shortened[/]"
