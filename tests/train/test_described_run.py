"""The first lines of a run: what is trained, and what a person should know of it."""

from types import SimpleNamespace

from omegaconf import OmegaConf

from posttrain.train.metrics import describe


def lines(rows, steps, batch, epochs, notes=(), unread=None):
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
    )
    return describe(run)


def test_more_passes_than_asked_for_are_said():
    """Five rows in steps of four are two steps: three rows are trained twice."""
    assert "trainer.epochs=1 becomes 1.60: every step has 4 rows, and there are 5" in lines(5, 2, 4, 1.0)[-1]
    assert lines(100, 25, 4, 1.0)[-1] == "25 steps of 4 rows: 1.00 epochs"
    assert lines(5, 2, 4, None)[-1] == "2 steps of 4 rows: 1.60 epochs"  # steps were asked for


def test_what_is_not_in_the_text_is_said():
    """Names come from the data: nothing in them is markup."""
    *_, note, field = lines(4, 1, 4, None, ["left out: [bold]x"], {"mood[red]": 1234})
    assert note == r"[yellow]left out: \[bold]x[/]"
    assert field == r"[yellow]not in the text: mood\[red], in 1,234 conversations[/]"
