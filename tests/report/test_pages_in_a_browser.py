"""The pages as Chromium draws them: without a console message, in both colour schemes, wide and narrow."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import made_runs
import pytest

from posttrain.report import write_report

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
SCHEMES = {"dark": 0, "light": 1}  # of Chromium's setting
MEASURE = Path(__file__).with_name("measure.js").read_text()

pytestmark = [pytest.mark.slow, pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """Two by two trials; one failed."""
    root = tmp_path_factory.mktemp("sweep")
    losses = {(1e-4, 8): 0.9, (1e-4, 16): 0.7, (1e-3, 8): 0.2, (1e-3, 16): None}
    for number, ((lr, rank), loss) in enumerate(losses.items()):
        overrides = [f"optimizer.lr={lr}", f"peft.rank={rank}"]
        config = {"seed": 1, "optimizer": {"lr": lr}, "peft": {"rank": rank}}
        state, error = ("finished", "") if loss else ("failed", made_runs.ERROR)
        path = root / f"lr={lr},rank={rank}"
        made_runs.make_run(path, overrides, config, loss or 3.0, state=state, error=error, number=number)
    write_report(root)
    return root


def browse(page, tmp_path, width, scheme, act="nothing"):
    """What measure.js finds in a page, which must not have written to the console.

    The page's policy lets no other script run; here it is taken out, after the page has been opened with it as well.
    """
    text = page.read_text()
    measured = re.sub(r'<meta http-equiv="Content-Security-Policy".*?>', "", text, count=1, flags=re.S)
    assert measured != text
    file = tmp_path / "measured.html"
    file.write_text(measured.replace("</body>", f"<script>const act = '{act}';\n{MEASURE}</script></body>"))
    dom, said = dump(file, tmp_path, width, scheme)
    assert said == []
    return json.loads(re.search(r'<pre id="found">(.*?)</pre>', dom, re.S)[1].replace("&lt;", "<").replace("&gt;", ">"))


def dump(file, tmp_path, width, scheme):
    """The document after its scripts have run, and the lines of the console."""
    done = subprocess.run(
        [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=3000",
         f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}", f"--window-size={width},900", "--hide-scrollbars",
         "--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", f"file://{file}"],
        text=True, capture_output=True, timeout=120,
    )  # fmt: skip
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def test_a_page_runs_under_its_own_policy(sweep, tmp_path):
    dom, said = dump(sweep / "report.html", tmp_path, 1300, "light")
    assert said == [] and re.search(r'id="curves"[^>]*><svg', dom)


@pytest.mark.parametrize("width, scheme, ground", [(1300, "light", "(255, 255, 255)"), (500, "dark", "(16, 21, 28)")])
def test_the_page_of_a_sweep(sweep, tmp_path, width, scheme, ground):
    found = browse(sweep / "report.html", tmp_path, width, scheme, "sweep")
    assert found["content"] <= found["width"] == width and ground in found["ground"]
    assert found["empty"] == found["unnamed"] == 0
    assert found["rows"] == 1  # of a tile's long number
    reason, right = found["reason"]
    assert reason.startswith("rank 0 failed: <b>the loss is NaN</b>") and right <= width
    assert found["up"] == ["2,3,1,4", "ascending", True] or found["up"] == ["3,2,1,4", "ascending", True]
    assert found["down"][1] == "descending" and found["down"][0][0] in "14"
    assert found["heat"] == [["8", "0.9", "0.2"], ["16", "0.7", "failed"]]
    assert found["turned"] == ["0", "lr ↓  rank →", "8", "16"]
    assert "4 of 4 cells were tried" in found["caption"] and "rank 8, lr 0.001: 0.2" in found["caption"]
    assert found["lines"] == 8  # four smoothed curves and their measured values
    assert found["hidden"] == ["false", 6]
    assert found["passing"] == "2 of 4 trials pass."


def test_the_page_of_a_run(sweep, tmp_path):
    page = write_report(sweep / "lr=0.001,rank=8", tmp_path / "run.html")
    found = browse(page, tmp_path, 500, "light")
    assert found["content"] <= 500 and found["empty"] == found["unnamed"] == 0
    assert found["charts"] >= 7
