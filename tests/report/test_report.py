"""Reports, made from directories as runs leave them."""

import csv
import json
import math
import random
import re
import shutil
import socket
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import made_runs
import pytest
from omegaconf import OmegaConf
from rich.console import Console

from posttrain.config.composition import compose
from posttrain.errors import UserError
from posttrain.launch import launcher
from posttrain.report import __main__ as command
from posttrain.report import write_report
from posttrain.report.comparison import compare, differing, setting, short_names
from posttrain.report.curves import MOST_POINTS, axis_names, curve_tables, describe, points_per_curve
from posttrain.report.importance import parameter_importance
from posttrain.report.scales import key_axis, result_axis
from posttrain.report.sweep_page import render_sweep
from posttrain.report.table import print_table
from posttrain.report.trials import Trial, read_trials
from posttrain.utils import working

LOSSES = {(1e-4, 8): 0.9, (1e-4, 16): 0.7, (1e-3, 8): 0.2, (1e-3, 16): None}  # (lr, rank) -> val loss; None: failed
HOSTILE = {"prompt": "</script><script>alert(1)</script>", "before": "no", "after": '{"a":1}', "reference": "x"}


def write_run(path, overrides, loss, number=0):
    state, error = ("finished", "") if loss is not None else ("failed", made_runs.ERROR)
    config = OmegaConf.to_container(compose(overrides), resolve=True)
    return made_runs.make_run(
        path, overrides, config, loss or 3.0, state=state, error=error, number=number, samples=[HOSTILE]
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("made")
    for number, ((lr, rank), loss) in enumerate(LOSSES.items()):
        write_run(root / str(number), [f"optimizer.lr={lr}", f"peft.rank={rank}"], loss, number)
    return root


@pytest.fixture
def sweep(made, tmp_path):
    return Path(shutil.copytree(made, tmp_path / "sweep"))


@pytest.fixture(scope="module")
def search(tmp_path_factory):
    """45 trials of four keys."""
    root = made_runs.make_search(tmp_path_factory.mktemp("search"), 45, samples=[HOSTILE])
    return read_compared(root)


def read_compared(directory):
    return compare(read_trials(directory))


class Page(HTMLParser):
    """The structure of a page: the rows of its tables by id, figures without a caption, ids, text."""

    def __init__(self, path):
        super().__init__()
        self.open, self.ids, self.text = [], set(), []
        self.rows, self.figures, self.captions, self.links, self.buttons = [], 0, 0, set(), 0
        self.leaderboard = False
        self.feed(Path(path).read_text())

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.ids.add(attributes.get("id"))
        self.open.append(tag)
        if tag == "table":
            self.leaderboard = attributes.get("id") == "leaderboard"
        if tag == "tr" and self.leaderboard:
            self.rows.append([])
        if tag in ("td", "th") and self.leaderboard:
            self.rows[-1].append("")
        if tag == "button" and self.leaderboard and "th" in self.open:
            self.buttons += 1
        self.figures += tag == "figure"
        self.captions += tag == "figcaption"
        self.links.add(attributes.get("href") or attributes.get("src"))

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass
        if tag == "table":
            self.leaderboard = False

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.text.append(data)
        if self.leaderboard and self.rows and self.rows[-1]:
            self.rows[-1][-1] = f"{self.rows[-1][-1]} {data.strip()}".strip()


def data_of(page):
    return json.loads(re.search(r'id="data">(.*?)</script>', Path(page).read_text(), re.S)[1])


def test_trials_are_read_and_ranked(sweep):
    comparison = read_compared(sweep)
    assert [trial.name for trial in comparison.trials] == ["2", "1", "0", "3"]
    assert comparison.keys == ["optimizer.lr", "peft.rank"] and comparison.following == []
    assert comparison.labels == {"optimizer.lr": "lr", "peft.rank": "rank"}
    first, *_, last = comparison.trials
    assert first.command == "python -m posttrain optimizer.lr=0.001 peft.rank=8"
    assert dict(first.series["val_loss"])[0] == made_runs.BEFORE
    assert (last.state, last.summary) == ("failed", {})
    assert comparison.best is first


def test_without_a_validation_loss_the_training_loss_ranks_and_is_said(sweep, capsys):
    for number, loss in enumerate((0.9, 0.1, 0.5)):
        (sweep / f"{number}/summary.json").write_text(json.dumps({"train_loss": loss, "val_loss_after": None}))
    text = " ".join(Page(write_report(sweep)).text)
    assert "Ranked by training loss, since no trial has a validation loss" in text
    comparison = read_compared(sweep)
    assert [trial.name for trial in comparison.trials][:3] == ["1", "2", "0"]
    assert comparison.curve == "loss" and data_of(sweep / "report.html")["curves"][0] == "loss"


def test_a_trial_that_is_being_written_or_was_resumed_is_read_as_far_as_it_is(sweep):
    with open(sweep / "0/metrics.jsonl", "a") as file:
        file.write('{"step": 19, "loss": 7.5}\n{"step": 41, "lo')
    (sweep / "0/status.json").write_text('{"state": "running"}')
    (sweep / "0/summary.json").unlink()
    trial = next(trial for trial in read_trials(sweep) if trial.name == "0")
    assert trial.state == "running"
    assert [step for step, _ in trial.series["loss"]] == list(range(1, 41))
    assert dict(trial.series["loss"])[19] == 7.5
    write_report(sweep)


def test_a_run_whose_command_was_killed_is_not_running(sweep):
    """The lock goes with its process; a run on another machine can't be judged from here."""
    states = {}
    for number, host in enumerate((socket.gethostname(), socket.gethostname(), "another")):
        (sweep / f"{number}/status.json").write_text(json.dumps({"state": "running", "host": host}))
    launcher.lock_run(sweep / "1")
    for trial in read_trials(sweep):
        states[trial.name] = trial.state, trial.error
    assert states["0"][0] == "killed" and f"python -m posttrain --resume {sweep}/0 continues it" in states["0"][1]
    assert states["1"] == states["2"] == ("running", "")


def test_a_swept_group_is_one_column_and_what_follows_from_it_none(tmp_path):
    """Trials with and without LoRA differ in `peft`; its keys, which the other lacks, follow."""
    for name, loss in (("lora", 0.3), ("none", 0.4)):
        write_run(tmp_path / name, [f"peft={name}", "seed=3"], loss)
    comparison = read_compared(tmp_path)
    assert comparison.keys == ["peft"]
    assert "peft._target_" in comparison.following and "seed" not in comparison.following
    page = Page(write_report(tmp_path))
    assert [row[3] for row in page.rows] == ["peft", "lora", "none"]
    assert any("seed" in text for text in page.text)  # among what is fixed


def test_a_group_that_a_command_line_lacks_is_the_default_one(tmp_path):
    for number, overrides in enumerate((["peft=none"], ["seed=2"])):
        run = write_run(tmp_path / str(number), overrides, 0.1)
        choices = {"peft": "none" if number == 0 else "lora"}
        OmegaConf.save({"hydra": {"runtime": {"choices": choices}}}, run / ".hydra" / "hydra.yaml")
    trials = read_trials(tmp_path)
    assert [setting(trial, "peft") for trial in trials] == ["none", "lora"]


def test_totals(sweep):
    """Three trials of 40 steps of 2.5 s and 20 s before, one that failed after 12 steps; the second on four GPUs."""
    (sweep / "1/spec.yaml").write_text(json.dumps(made_runs.specification(4)))
    comparison = read_compared(sweep)
    assert comparison.seconds == 3 * 120 + 50
    assert comparison.gpu_hours == pytest.approx((2 * 120 + 50 + 4 * 120) / 3600)
    assert comparison.tokens == (3 * 40 + 12) * 4800
    assert comparison.states == {"finished": 3, "failed": 1}
    assert [(trial.name, best) for trial, best in comparison.history] == [("0", 0.9), ("1", 0.7), ("2", 0.2)]


def test_short_names_are_unique_and_without_what_is_common():
    assert short_names(["a/lr=1,rank=8", "a/lr=1,rank=16"]) == {"a/lr=1,rank=8": "rank=8", "a/lr=1,rank=16": "rank=16"}
    assert short_names(["run1", "run2"]) == {"run1": "run1", "run2": "run2"}
    assert short_names(["x,", "x,y"]) == {"x,": "x,", "x,y": "y"}
    assert short_names(["only,one"]) == {"only,one": "only,one"}


def test_the_terminal_table_of_four_keys_fits_80_columns(search):
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    print_table(search, console)
    lines = console.export_text().splitlines()
    header = " ".join(lines[:4]).split()
    for part in ("#", "lr", "rank", "global_", "batch_", "size", "seed", "val", "loss", "status"):
        assert part in header
    table = lines[: lines.index(next(line for line in lines if "more, which the page shows" in line))]
    assert max(map(len, table)) <= 80 and not any("…" in line for line in table)
    first = next(line for line in lines if line.startswith("* 1"))
    best = search.best
    assert first.split()[2:6] == [
        f"{best.config[key]:.4g}" for key in ("optimizer.lr", "peft.rank", "trainer.global_batch_size", "seed")
    ]
    below = " ".join(" ".join(lines[len(table) :]).split())
    assert re.search(r"trials [\d, ]+: rank 0 failed: <b>the loss is NaN</b> at step 37", below)
    assert any("GPU-hours" in line for line in lines)


def test_the_terminal_table_names_trials_that_no_column_tells_apart(sweep):
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    print_table(read_compared(sweep), console)
    lines = console.export_text().splitlines()
    assert lines[0].split() == ["train", "training"]
    assert lines[1].split()[:8] == ["#", "trial", "lr", "rank", "val", "loss", "loss", "tok/s"]
    assert lines[2].split()[:7] == ["*", "1", "2", "0.001", "8", "0.2", "0.21"]
    assert f"best again   python -m posttrain --rerun {sweep}/2  (" in "\n".join(lines)
    assert any(line.startswith("trial 4, 3: rank 0 failed: <b>the loss is NaN</b>") for line in lines)


def test_long_values_and_names_are_below_the_table_in_full(tmp_path):
    """Runs of a folder that differ in paths: every key that differs is a column or below, with its whole value."""
    paths = ["/data/team/customers/2026/first.jsonl", "/data/team/customers/2026/second.jsonl"]
    for number, path in enumerate(paths):
        run = tmp_path / "2026-11-29" / f"a-name-of-more-than-24-characters-{number}"
        write_run(run, [f"data.path={path}", f"optimizer.lr={number + 1}e-4", f"seed={number}"], 0.3 + number)
    for width in (100, 40):
        console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
        print_table(read_compared(tmp_path), console)
        lines = console.export_text().splitlines()
        text = "\n".join(lines)
        for number, path in enumerate(paths):
            (line,) = [line for line in lines if f"path={path}" in line]
            assert f"a-name-of-more-than-24-characters-{number}" in line
            assert f"seed={number}" in line or "seed" in text.partition("* 1")[0]
        assert "…" not in text
        assert text.count("first.jsonl") == 1
        assert ("...-than-24-characters-0" in text) == (width == 100)


def test_runs_of_different_keys_are_told_apart_in_80_columns(tmp_path):
    """What moves the weights has columns, long texts none; a run without validation has its last training loss."""
    path = "data.path=/home/me/experiments/answers.jsonl"
    runs = {
        "first-try": [path, "trainer.max_steps=60", "trainer.global_batch_size=8"],
        "higher-rate": [path, "trainer.max_steps=40", "optimizer.lr=3e-4", "data.where='len(answer) > 20'"],
        "higher-rate-again": [path, "trainer.max_steps=40", "optimizer.lr=4e-4", "data.where='len(answer) > 20'"],
        "more-rank": [path.replace("/me/", "/you/"), "trainer.max_steps=40", "peft.rank=32"],
    }
    for number, (name, overrides) in enumerate(runs.items()):
        state = "running" if name == "more-rank" else "finished"
        config = OmegaConf.to_container(compose(overrides), resolve=True)
        made_runs.make_run(tmp_path / name, overrides, config, 0.5 + number, state=state, number=number)
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    comparison = read_compared(tmp_path)
    print_table(comparison, console)
    table, below, *_ = console.export_text().split("\n\n")
    assert max(map(len, table.splitlines())) <= 80
    heading = table.splitlines()[:-4]
    assert heading[-1].split()[:4] == ["#", "trial", "lr", "rank"]
    rows = [line.split() for line in table.splitlines()[-4:]]
    assert [row[-1] for row in rows] == ["finished"] * 3 + ["running"]
    assert rows[1][:3] == ["2", "higher-rate", "0.0003"] and rows[2][:3] == ["3", "higher-rate-again", "0.0004"]
    last_loss = made_runs.curve_points(random.Random(3), 3.5, 12, 0.0)[-1]["loss"]
    assert rows[3][:2] == ["4", "more-rank"] and rows[3][3] == "32" and f"{last_loss:.4g}" in rows[3]
    assert "where" not in table and "answers" not in table
    assert "2  path=/home/me/experiments/answers.jsonl  where=len(answer) > 20" in below


def test_minutes_do_not_run_backwards(tmp_path):
    """The machine's clock was set back by two minutes after the second line."""
    lines = zip((0, 1, 2, 3), (100.0, 160.0, 40.0, 100.0), strict=True)
    text = "".join(json.dumps({"step": step, "time": time, "loss": 1.0}) + "\n" for step, time in lines)
    (tmp_path / "metrics.jsonl").write_text(text)
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    (tmp_path / "status.json").write_text("{}")
    (table,) = data_of(write_report(tmp_path))["trials"][0]["curves"]
    assert table["minutes"] == [0, 1, 1, 2]


def test_page_is_whole_and_harmless(sweep):
    path = write_report(sweep)
    assert path == sweep / "report.html"
    text = path.read_text()
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//""", text)
    assert "default-src 'none'" in text and re.search(r"script-src 'sha256-[\w+/]+='", text)
    assert "alert(1)</script>" not in text and "<b>the loss is NaN" not in text
    assert "&lt;b&gt;the loss is NaN" in text
    page = Page(path)
    assert page.links <= {None, "data:,", "report.csv", *(f"#trial:{name}" for name in "0123")}
    assert "--rerun" not in text
    assert all(link[1:] in page.ids for link in page.links if link and link.startswith("#"))
    assert page.figures == page.captions >= 4


def test_leaderboard(sweep):
    page = Page(write_report(sweep))
    head, *rows = page.rows
    assert head[:5] == ["trial", "status", "val loss", "lr", "rank"]
    assert page.buttons == len(head)
    assert [row[0] for row in rows] == ["1 2", "2 1", "3 0", "4 3"]  # rank and name
    assert [row[2:5] for row in rows] == [
        ["0.2", "0.001", "8"],
        ["0.7", "0.0001", "16"],
        ["0.9", "0.0001", "8"],
        ["", "0.001", "16"],
    ]
    assert rows[0][1] == "finished" and rows[3][1].startswith("failed rank 0 failed: <b>the loss is NaN</b> at step 37")


def test_csv_has_the_numbers_and_no_formula(sweep):
    status = {"state": "failed", "error": '=HYPERLINK("http://x")'}
    (sweep / "3/status.json").write_text(json.dumps(status))
    write_report(sweep)
    rows = list(csv.DictReader((sweep / "report.csv").read_text().splitlines()))
    assert [row["trial"] for row in rows] == ["2", "1", "0", "3"]
    assert [row["val_loss_after"] for row in rows] == ["0.2", "0.7", "0.9", ""]
    assert [float(row["optimizer.lr"]) for row in rows] == [1e-3, 1e-4, 1e-4, 1e-3]
    assert rows[3]["error"] == "'" + status["error"]


def test_a_key_of_numbers_has_a_logarithmic_axis_where_they_span_magnitudes():
    axis = key_axis("optimizer.lr", "lr", [1e-3, 1e-5, 1e-4, 1e-5])
    assert axis.positions == [1, 0, 0.5, 0]
    assert axis.bins == ["1e-05", "0.0001", "0.001"] and axis.places == [2, 0, 1, 0]
    assert key_axis("k", "k", [2, 4, 3]).positions == [0, 1, 0.5]


def test_texts_and_nothing_follow_the_numbers_and_true_is_none():
    assert key_axis("k", "k", ["b", 10, None, 2, "a"]).bins == ["2", "10", "a", "b", "null"]
    assert key_axis("k", "k", [True, False]).bins == ["false", "true"]


def test_many_numbers_share_bins():
    values = [10 ** (-5 + 2 * i / 99) for i in range(100)]
    axis = key_axis("optimizer.lr", "lr", values)
    assert len(axis.bins) == 8 and axis.places == sorted(axis.places) and set(axis.places) == set(range(8))
    assert axis.bins[0].startswith("1e-05") and axis.bins[-1].endswith("0.001")


def test_a_result_that_some_trials_lack():
    axis = result_axis("val_loss_after", "val loss", [0.2, None, 0.7, 0.45])
    assert axis.positions == [0, None, 1, 0.5] and [text for _, text in axis.ticks] == ["0.2", "0.7"]
    assert result_axis("x", "x", [None]) is None


def test_importance_finds_what_the_loss_depends_on(search):
    """made_runs: the learning rate first, then the rank, the batch size a little, the seed not at all."""
    importance = parameter_importance(search)
    assert importance.skipped == "" and importance.explained > 0.8
    assert list(importance.shares)[:2] == ["optimizer.lr", "peft.rank"]
    assert list(importance.shares)[-1] == "seed" and importance.shares["seed"] < 0.02
    assert sum(importance.shares.values()) == pytest.approx(1)


def made_trials(losses):
    trials = []
    for number, loss in enumerate(losses):
        config, overrides = {"seed": number}, [f"seed={number}"]
        trials.append(
            Trial(str(number), Path(str(number)), config, overrides, "finished", summary={"train_loss": loss})
        )
    return compare(trials)


@pytest.mark.parametrize(
    "losses, reason",
    [
        ([1.0, 2.0, 3.0], "it takes 8 trials with a result, here are 3"),
        ([1.0] * 9, "the same result"),
        ([1.0, 5.0] * 8, "don't follow from the swept values"),
    ],
)
def test_importance_says_why_it_is_not_shown(losses, reason):
    assert reason in parameter_importance(made_trials(losses)).skipped


def test_two_hundred_trials_make_a_page_of_a_megabyte(search, tmp_path):
    trials = [replace(search.trials[i % 45], name=f"trial {i}") for i in range(200)]
    page = tmp_path / "report.html"
    page.write_text(render_sweep(compare(trials), "search", "report.csv"))
    assert page.stat().st_size < 2_000_000
    structure = Page(page)
    assert len(structure.rows) == 200 + 1 and "trial:trial 199" in structure.ids
    data = data_of(page)
    drawn = sum(len(table["step"]) * len(table["values"]) for trial in data["trials"] for table in trial["curves"])
    assert drawn <= 80_000


def test_long_curves_are_thinned_and_keep_their_end(sweep):
    with open(sweep / "1/metrics.jsonl", "a") as file:
        file.writelines(json.dumps({"step": s, "loss": 1.0}) + "\n" for s in range(41, 10_001))
    trial = next(trial for trial in read_trials(sweep) if trial.name == "1")
    table = next(table for table in curve_tables(trial, points_per_curve([trial])) if "loss" in table["values"])
    assert 1000 < len(table["step"]) <= MOST_POINTS and table["step"][-1] == 10_000


def test_curves_are_drawn_over_steps_minutes_epochs_and_tokens_where_a_run_has_them(sweep):
    trial = read_compared(sweep).best
    table = next(table for table in curve_tables(trial, 50) if "val_loss" in table["values"])
    assert table["step"] == [0, 10, 20, 30, 40]
    assert table["tokens"] == [0, 48_000, 96_000, 144_000, 192_000] and table["epoch"][-1] == 40 / 94
    assert axis_names([trial]) == ["step", "minutes", "epoch", "tokens"]
    del trial.series["tokens"]
    assert axis_names([trial]) == ["step", "minutes", "epoch"] and "tokens" not in curve_tables(trial, 50)[0]


def test_a_curve_in_words():
    assert describe([(0, 3.5), (10, 0.2), (20, 0.5)]) == "From 3.5 at step 0 to 0.5 at step 20; lowest 0.2 at step 10."
    assert describe([(4, 1.0)]) == "1 at step 4."


def test_what_takes_time_is_said_meanwhile(sweep):
    told = []
    working.report_to(lambda *phase: told.append(phase))
    try:
        write_report(sweep)
    finally:
        working.report_to(None)
    assert told[0][:2] == ("reading the runs", 0) and told[-2][1] == told[-2][2] == len(read_trials(sweep))
    assert told[-1][0] == "drawing the page"


def test_best_is_a_link_to_the_best_export_and_moves(sweep):
    write_report(sweep)
    assert (sweep / "best").resolve() == (sweep / "2/adapter").resolve()
    assert not (sweep / "best").readlink().is_absolute()
    write_run(sweep / "4", ["optimizer.lr=5e-4"], 0.1)
    write_report(sweep)
    assert (sweep / "best").resolve() == (sweep / "4/adapter").resolve()
    assert len(read_trials(sweep)) == 5  # the link is not a trial


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("page.csv", r"--out .*page\.csv: is not the name of a page"),  # the table would take the page's place
        ("", r"--out \.: is not the name of a page"),
        ("/proc/x.html", r"/proc/x\.html: can't be written: .*; choose another place for the page: --out PAGE"),
    ],
)
def test_a_page_that_cannot_be_written(sweep, tmp_path, monkeypatch, out, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        write_report(sweep, Path(out))
    assert not (tmp_path / "page.csv").exists()


def test_one_run_alone(sweep, tmp_path, capsys):
    out = tmp_path / "page.html"
    assert write_report(sweep / "2", out) == out
    assert not (sweep / "2/best").exists() and not (tmp_path / "page.csv").exists()
    printed = capsys.readouterr().out
    for fact in (
        "finished",
        "demo:smollm2_135m",
        "0.001",
        "0.2  (3.613 before training)",
        "192,000  (96,000 supervised)",
        "1 GPU  (bf16)",
        "adapter",
    ):
        assert fact in printed
    page = Page(out)
    text = " ".join(page.text)
    for part in (
        "9.75 GiB",
        "9.6 planned",
        "optimizer.lr",
        "0.001",
        "170,209",
        "dropped: too long",
        "9 s",
        "python -m",
    ):
        assert part in text
    assert page.figures == page.captions == 8
    assert "loss: from" in text and "val_loss: from 3.613 at step 0 to 0.2 at step 40." in text
    (trial,) = data_of(out)["trials"]
    names = {name for table in trial["curves"] for name in table["values"]}
    assert {"loss", "val_loss", "lr", "grad_norm", "tokens_per_second", "padding"} <= names


def test_what_the_command_line_chose_comes_before_what_follows(tmp_path):
    run = write_run(tmp_path / "run", ["peft=none", "optimizer.lr=3e-6"], 0.3)
    text = " ".join(Page(write_report(run)).text)
    chosen, following = text.index("Chosen on the command line"), text.index("Different from the defaults as well")
    assert chosen < text.index("optimizer.lr", chosen) < text.index("3e-06", chosen) < following
    assert chosen < text.index("peft", chosen) < following < text.index("peft._target_")


def test_a_run_without_any_number(tmp_path):
    for file, text in (("config.yaml", "seed: 1\n"), ("status.json", '{"state": "queued"}')):
        (tmp_path / file).write_text(text)
    text = " ".join(Page(write_report(tmp_path)).text)
    assert "There is no export yet" in text and "queued" in text


def record_inputs(sweep, started, **inputs):
    """Add to each run when it began and what it read: trial -> digest, 'x' by default."""
    for number in range(4):
        digests = {"data": "x", "validation": "x", "template": "x", "weights": "x"}
        for name, values in inputs.items():
            digests[name] = values[number]
        (sweep / f"{number}/inputs.json").write_text(json.dumps(digests))
        status = json.loads((sweep / f"{number}/status.json").read_text())
        (sweep / f"{number}/status.json").write_text(json.dumps({**status, "started": started[number]}))


@pytest.mark.parametrize("what", ["validation", "data", "template", "weights"])
def test_what_was_made_or_validated_with_other_files_is_ranked_apart(sweep, what, capsys):
    """Trial 1 was the last, and 0 is of its files; trial 2, of others, has the smallest loss."""
    record_inputs(sweep, [5, 40, 10, 20], **{what: ["new", "new", "old", "old"]})
    write_report(sweep)
    trials = read_compared(sweep).trials
    assert [(trial.name, trial.group) for trial in trials] == [("1", 0), ("0", 0), ("2", 1), ("3", 1)]
    assert "made or validated with other files" in capsys.readouterr().out
    assert (sweep / "best").resolve() == (sweep / "1/adapter").resolve()


def test_rows_that_the_configuration_tells_apart_are_compared(sweep):
    """A sweep over data.path has different training rows by intention, and one validation set."""
    for number, path in enumerate(("a", "b", "c", "d")):
        config = OmegaConf.load(sweep / f"{number}/config.yaml")
        config.data.path = path
        OmegaConf.save(config, sweep / f"{number}/config.yaml")
    record_inputs(sweep, [1, 2, 3, 4], data=["a", "b", "c", "d"])
    assert [trial.name for trial in read_compared(sweep).trials] == ["2", "1", "0", "3"]
    (sweep / "2/config.yaml").write_text("a: [")
    comparison = read_compared(sweep)
    different = differing(comparison.trials)
    assert comparison.best.name == "1" and "data.path" in different and len(different) == 3


def test_a_folder_named_best_or_a_damaged_configuration_spoils_no_report(sweep, capsys):
    (sweep / "best").mkdir()
    (sweep / "1/config.yaml").write_text("peft: {rank: [")
    page_text = write_report(sweep).read_text()
    captured = capsys.readouterr()
    assert "best: is no link" in captured.err and "trial 3, 1: " in captured.out and "damaged" in captured.out
    assert "optimizer.lr=0.001 peft.rank=8" in page_text and list(sweep.glob(".best*")) == []
    assert not (sweep / "best").is_symlink()


@pytest.mark.parametrize("name, said", [("none", "no such directory"), ("empty", "no run in it")])
def test_wrong_directory(tmp_path, monkeypatch, capsys, name, said):
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr("sys.argv", ["report", str(tmp_path / name)])
    with pytest.raises(SystemExit) as stopped:
        command.main()
    assert stopped.value.code == 2 and said in capsys.readouterr().err


def test_a_directory_of_damaged_and_hostile_files(tmp_path, made):
    """Read as far as it can be; nothing acts on the terminal, ends the page's script or stops other runs' report."""
    shutil.copytree(made, tmp_path / "runs")
    path = tmp_path / "runs" / "0"
    status = {"state": "failed", "error": "\x1b]0;title\x07 <script>alert(2)</script>"}
    (path / "status.json").write_text(json.dumps(status))
    (path / "summary.json").write_text('["no", "summary"]')
    (path / "samples.json").write_bytes(b'[1, {"prompt": "half a char \xe2')
    (path / "spec.yaml").write_text("processes: [1]\ndevice: {a: 1}\nmodel: 7\ntrained: {parameters: x}\n")
    (path / ".hydra" / "overrides.yaml").write_text("{a: b}")
    lines = [
        b'{"step": 1, "loss": Infinity}',
        b'{"loss": 1}',
        b"7",
        b"[" * 100_000,
        b'{"step": 2, "loss": 2, "x": "\xe2',
    ]
    (path / "metrics.jsonl").write_bytes(b"\n".join([b'{"step": 1, "loss": 3.5}', *lines]))
    answer = {"step": 1, "prompt": "q", "answer": "one\u2028two"}
    (path / "samples.jsonl").write_text(json.dumps(answer, ensure_ascii=False) + '\n{"step": 2, "prompt": ["q"]}\n')
    comparison = read_compared(tmp_path / "runs")
    trial = next(trial for trial in comparison.trials if trial.path == path)
    assert trial.series == {"loss": [(1, 3.5)]} and trial.answers == {"q": [(1, "one\u2028two")]}
    assert (trial.summary, trial.samples, trial.command) == ({}, [], None)
    console = Console(record=True, width=200)
    print_table(comparison, console)
    assert "\\x1b]0;title" in (text := console.export_text()) and "\x1b" not in text
    for directory in (tmp_path / "runs", path):
        page = write_report(directory).read_text()
        assert "<script>alert" not in page and "\x1b" not in page


def test_a_configuration_that_would_fill_the_memory(tmp_path, made):
    shutil.copytree(made / "0", tmp_path / "run")
    levels = "".join(f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 10)}]\n" for n in range(1, 9))
    (tmp_path / "run" / "config.yaml").write_text(f"l0: &l0 [x]\n{levels}")
    (trial,) = read_trials(tmp_path)
    assert trial.state == "damaged" and "more than 100000 values" in trial.error and not trial.config


def test_numbers_of_any_kind_in_a_summary(tmp_path, made):
    """Lists, texts, and numbers that are none are left out of rankings, axes and facts."""
    shutil.copytree(made, tmp_path / "runs")
    odd = {"val_loss_after": [1], "tokens": "many", "tokens_per_second": 10**400, "train_seconds": True, "data": 3}
    for number in "012":
        (tmp_path / "runs" / number / "summary.json").write_text(json.dumps(odd))
        write_report(tmp_path / "runs" / number)
    write_report(tmp_path / "runs")
    assert all(math.isinf(trial.score("val_loss_after")) for trial in read_trials(tmp_path / "runs"))
