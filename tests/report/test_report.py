"""The report of a sweep, made from directories as runs leave them."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from rich.console import Console

from posttrain.config.composition import compose
from posttrain.errors import UserError
from posttrain.report import __main__ as command
from posttrain.report import write_report
from posttrain.report.table import print_table
from posttrain.report.trials import best_trial, differing, read_trials

pytest.importorskip("plotly")
from posttrain.report import figures, page

LOSSES = {(1e-4, 8): 0.9, (1e-4, 16): 0.7, (1e-3, 8): 0.2, (1e-3, 16): None}  # (lr, rank) -> val loss; None: failed
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


def write_run(path, overrides, loss, samples=()):
    (path / ".hydra").mkdir(parents=True)
    OmegaConf.save(compose(overrides), path / "config.yaml", resolve=True)
    OmegaConf.save(OmegaConf.create(overrides), path / ".hydra/overrides.yaml")
    points = [{"step": 0, "time": 1000.0, "val_loss": 3.6}]
    points += [{"step": s, "time": 1000.0 + 3 * s, "loss": 3.6 / (s + 1), "lr": 1e-4 * s} for s in range(1, 21)]
    if loss is None:
        status = {"state": "failed", "error": "rank 0 failed: <b>loss is NaN</b>"}
    else:
        status = {"state": "finished"}
        points.append({"step": 20, "time": 1061.0, "val_loss": loss})
        summary = {"val_loss_before": 3.6, "val_loss_after": loss, "train_loss": loss, "tokens_per_second": 250.0}
        (path / "summary.json").write_text(json.dumps(summary))
        (path / "samples.json").write_text(json.dumps(list(samples)))
        (path / "adapter").mkdir()
    (path / "status.json").write_text(json.dumps(status))
    (path / "metrics.jsonl").write_text("".join(json.dumps(point) + "\n" for point in points))
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("made")
    hostile = {"prompt": "</script><script>alert(1)</script>", "before": "no", "after": '{"a":1}', "reference": "x"}
    for number, ((lr, rank), loss) in enumerate(LOSSES.items()):
        write_run(root / str(number), [f"optimizer.lr={lr}", f"peft.rank={rank}"], loss, [hostile])
    return root


@pytest.fixture
def sweep(made, tmp_path):
    return Path(shutil.copytree(made, tmp_path / "sweep"))


def test_trials_are_read_best_first(sweep):
    trials = read_trials(sweep)
    assert [trial.name for trial in trials] == ["2", "1", "0", "3"]
    assert sorted(differing(trials)) == ["optimizer.lr", "peft.rank"]
    assert trials[0].command == "python -m posttrain optimizer.lr=0.001 peft.rank=8"
    assert trials[0].series["val_loss"] == [(0, 3.6), (20, 0.2)]
    assert (trials[3].state, trials[3].summary) == ("failed", {})
    assert best_trial(trials).name == "2"


def test_a_trial_that_is_being_written_or_was_resumed_is_read_as_far_as_it_is(sweep):
    with open(sweep / "0/metrics.jsonl", "a") as file:
        file.write('{"step": 19, "loss": 7.5}\n{"step": 21, "lo')
    (sweep / "0/status.json").write_text('{"state": "running"}')
    (sweep / "0/summary.json").unlink()
    trial = next(trial for trial in read_trials(sweep) if trial.name == "0")
    assert trial.state == "running"
    assert [step for step, _ in trial.series["loss"]] == list(range(1, 21))
    assert dict(trial.series["loss"])[19] == 7.5
    write_report(sweep)


def test_table_shows_what_differs_and_what_failed(sweep):
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    print_table(read_trials(sweep), console)
    lines = console.export_text().splitlines()
    assert lines[0].split()[:5] == ["trial", "lr", "rank", "val", "loss"]
    assert lines[1].split()[0] == "*" and "0.2" in lines[1]
    assert any(line.startswith("3: rank 0 failed: <b>loss is NaN</b>") for line in lines)


def test_minutes_do_not_run_backwards(tmp_path):
    """The machine's clock was set back by two minutes after the second line."""
    lines = zip((0, 1, 2, 3), (100.0, 160.0, 40.0, 100.0), strict=True)
    text = "".join(json.dumps({"step": step, "time": time, "loss": 1.0}) + "\n" for step, time in lines)
    (tmp_path / "metrics.jsonl").write_text(text)
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    (tmp_path / "status.json").write_text("{}")
    page = write_report(tmp_path).read_text()
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])
    assert data["trials"][0]["series"]["loss"]["minutes"] == [0, 1, 1, 2]


def test_page_is_whole_and_harmless(sweep):
    path = write_report(sweep)
    assert path == sweep / "report.html"
    text = path.read_text()
    own = text.replace(page.get_plotlyjs(), "")
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//""", own)
    assert "default-src 'none'" in own
    assert "alert(1)</script>" not in own and "<b>loss is NaN" not in own
    assert "&lt;b&gt;loss is NaN" in own
    data = json.loads(re.search(r'id="data">(.*?)</script>', own, re.S)[1])
    assert data["curves"] == ["loss", "val_loss", "lr"]
    assert data["trials"][0]["series"]["val_loss"] == {"step": [0, 20], "minutes": [0, 1.0167], "value": [3.6, 0.2]}
    default = compose().peft.rank
    here = [str(rank) for rank in (8, 16, 8, 16) if rank != default]  # of trials 2, 1, 0, 3
    assert re.findall(rf"<code>peft.rank</code></td><td>{default}</td><td>(.*?)</td>", own) == here


def test_heat_map_and_parallel_coordinates(sweep):
    trials = read_trials(sweep)
    heat = figures.heat_map(trials).data[0]
    assert (list(heat.x), list(heat.y)) == (["8", "16"], ["0.0001", "0.001"])
    assert [list(row) for row in heat.z] == [[0.9, 0.7], [0.2, None]]
    lr, rank, loss, _ = figures.parallel_coordinates(trials).data[0].dimensions
    assert (rank.label, list(rank.values)) == ("rank", [8, 16, 8])
    assert (lr.label, list(lr.values), list(lr.ticktext)) == ("lr", [-3, -4, -4], ["0.0001", "0.001"])
    assert list(loss.values) == [0.2, 0.7, 0.9]


def test_long_curves_are_thinned_and_keep_their_end(sweep):
    with open(sweep / "1/metrics.jsonl", "a") as file:
        file.writelines(json.dumps({"step": s, "loss": 1.0}) + "\n" for s in range(21, 10_001))
    trial = next(trial for trial in read_trials(sweep) if trial.name == "1")
    steps = page._curve(trial, "loss")["step"]
    assert len(steps) <= page.MOST_POINTS and steps[-1] == 10_000


def test_best_is_a_link_to_the_best_export_and_moves(sweep):
    write_report(sweep)
    assert (sweep / "best").resolve() == (sweep / "2/adapter").resolve()
    assert not (sweep / "best").readlink().is_absolute()
    write_run(sweep / "4", ["optimizer.lr=5e-4"], 0.1)
    write_report(sweep)
    assert (sweep / "best").resolve() == (sweep / "4/adapter").resolve()
    assert len(read_trials(sweep)) == 5  # the link is not a trial


def test_one_run_alone(sweep, tmp_path):
    out = tmp_path / "page.html"
    assert write_report(sweep / "2", out) == out
    assert 'id="heat"' not in out.read_text() and not (sweep / "2/best").exists()


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
    trials = read_trials(sweep)
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
    assert [trial.name for trial in read_trials(sweep)] == ["2", "1", "0", "3"]
    (sweep / "2/config.yaml").write_text("a: [")
    trials = read_trials(sweep)
    assert best_trial(trials).name == "1" and "data.path" in differing(trials) and len(differing(trials)) == 3


def test_a_folder_named_best_or_a_damaged_configuration_spoils_no_report(sweep, capsys):
    (sweep / "best").mkdir()
    (sweep / "1/config.yaml").write_text("peft: {rank: [")
    page_text = write_report(sweep).read_text()
    captured = capsys.readouterr()
    assert "best: is no link" in captured.err and "1: " in captured.out and "damaged" in captured.out
    assert "optimizer.lr=0.001 peft.rank=8" in page_text and list(sweep.glob(".best*")) == []
    assert not (sweep / "best").is_symlink()


@pytest.mark.parametrize("name, said", [("none", "no such directory"), ("empty", "no run in it")])
def test_wrong_directory(tmp_path, monkeypatch, capsys, name, said):
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr("sys.argv", ["report", str(tmp_path / name)])
    with pytest.raises(SystemExit) as stopped:
        command.main()
    assert stopped.value.code == 2 and said in capsys.readouterr().err


def test_without_plotly_the_table_is_printed_and_the_extra_named(sweep, monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "posttrain.report.page")
    monkeypatch.delattr("posttrain.report.page")
    monkeypatch.setitem(sys.modules, "plotly", None)
    monkeypatch.setitem(sys.modules, "plotly.colors", None)
    with pytest.raises(UserError, match="--extra sweep"):
        write_report(sweep)
    assert "rank" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_in_a_browser(sweep, tmp_path):
    """Drawn without a console message of the page's own; the controls work."""
    text = write_report(sweep).read_text()
    actions = """<script>
      by("smoothing").value = 0.9; by("log").checked = true; by("curve").value = "val_loss";
      by("smoothing").dispatchEvent(new Event("input"));
      document.querySelectorAll("#leaderboard th")[0].click();
      const rows = [...document.querySelectorAll("#leaderboard tbody tr")];
      document.body.dataset.order = rows.map((row) => row.cells[0].textContent);
      document.body.dataset.axis = by("curves").layout.yaxis.type + " " + by("curves").data.length;
    </script></body>"""
    (tmp_path / "acted.html").write_text(text.replace("</body>", actions))
    done = subprocess.run(
        [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--use-angle=swiftshader",
         "--enable-unsafe-swiftshader", "--virtual-time-budget=5000", "--enable-logging=stderr",
         f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", f"file://{tmp_path / 'acted.html'}"],
        text=True, capture_output=True, timeout=120,
    )  # fmt: skip
    said = [line for line in done.stderr.splitlines() if "CONSOLE" in line and "GL Driver Message" not in line]
    assert said == []
    body = re.search(r"<body[^>]*>", done.stdout)[0]
    assert 'data-order="0,1,2,3"' in body
    assert 'data-axis="log 8"' in body  # 4 smoothed curves and their raw points
    for figure in ("curves", "heat", "parallel"):
        assert re.search(rf'id="{figure}"[^>]*>\s*<div class="plot-container', done.stdout), figure


def test_a_directory_of_damaged_and_hostile_files(tmp_path, made):
    """Read as far as it can be; nothing acts on the terminal, ends the page's script or stops other runs' report."""
    shutil.copytree(made, tmp_path / "runs")
    path = tmp_path / "runs" / "0"
    status = {"state": "failed", "error": "\x1b]0;title\x07 <script>alert(2)</script>"}
    (path / "status.json").write_text(json.dumps(status))
    (path / "summary.json").write_text('["no", "summary"]')
    (path / "samples.json").write_bytes(b'[1, {"prompt": "half a char \xe2')
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
    trials = read_trials(tmp_path / "runs")
    trial = next(trial for trial in trials if trial.path == path)
    assert trial.series == {"loss": [(1, 3.5)]} and trial.answers == {"q": [(1, "one\u2028two")]}
    assert (trial.summary, trial.samples, trial.command) == ({}, [], None)
    console = Console(record=True, width=200)
    print_table(trials, console)
    assert "\\x1b]0;title" in (text := console.export_text()) and "\x1b" not in text
    assert "<script>alert" not in page.render(trials, "all")


def test_a_configuration_that_would_fill_the_memory(tmp_path, made):
    shutil.copytree(made / "0", tmp_path / "run")
    levels = "".join(f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 10)}]\n" for n in range(1, 9))
    (tmp_path / "run" / "config.yaml").write_text(f"l0: &l0 [x]\n{levels}")
    (trial,) = read_trials(tmp_path)
    assert trial.state == "damaged" and "more than 100000 values" in trial.error and not trial.config
