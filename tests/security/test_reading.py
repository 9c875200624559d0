"""What is read for a configuration, data or a run: kernel files, searches, expressions and rows without end."""

import json
import os
import time
from pathlib import Path

import pytest

from posttrain.config.composition import compose
from posttrain.data import sources
from posttrain.data.readers import read
from posttrain.data.templates import ChatTemplate
from posttrain.errors import UserError
from posttrain.evaluate.scores import ExactMatch
from posttrain.report import write_report
from posttrain.spec import checks
from posttrain.utils import kernel_files

KERNEL = ["/proc/self/environ", "/proc/1/cmdline", "/sys/kernel/notes", "/dev/null", "/dev/stdin", "/proc/self/fd/0"]


@pytest.mark.parametrize("path", KERNEL)
def test_a_file_of_the_kernels_is_no_template(path, tmp_path):
    (tmp_path / "link.jinja").symlink_to(path)
    for file in (path, str(tmp_path / "link.jinja")):
        with pytest.raises(UserError, match=r"lies in /(proc|sys|dev)|not a plain file"):
            ChatTemplate(name="custom", file=file).read()
        with pytest.raises(UserError, match=r"template\.file|lies in|not a plain file"):
            checks.check(compose(["template=custom", f"template.file={file}"]), 0)


@pytest.mark.parametrize("key", ["data.path", "data.validation_path", "model.path", "model.tokenizer"])
@pytest.mark.parametrize("path", ["/proc/self", "/proc/self/task", "/sys", "/dev", "/dev/fd", "LINK"])
def test_nor_data_nor_a_model(key, path, tmp_path):
    (tmp_path / "link").symlink_to("/proc/self")
    place = path.replace("LINK", str(tmp_path / "link"))
    with pytest.raises(UserError, match=f"{key}=.*lies in /"):
        checks.check(compose(["data=alpaca", "data.path=README.md", f"{key}={place}"]), 0)


def test_nor_is_one_found_in_a_folder(tmp_path):
    (tmp_path / "x.jsonl").symlink_to("/proc/self/environ")
    for path in (tmp_path, tmp_path / "*.jsonl", tmp_path / "**" / "*.jsonl", tmp_path / "x.jsonl"):
        with pytest.raises(UserError, match="lies in /proc"):
            sources.files(str(path), "data.path", tmp_path)


def test_files_kept_in_memory_are_files():
    kernel_files.refuse(Path("/dev/shm/data.jsonl"), "data.path")


@pytest.fixture
def tangle(tmp_path):
    """Two folders, in each of which two links lead back to the top: there are 2**40 ways down."""
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
        for link in "xy":
            (tmp_path / name / link).symlink_to(tmp_path)
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "rows.jsonl").write_text("{}\n")
    return tmp_path


def test_links_that_lead_back_are_followed_once(tangle):
    began = time.monotonic()
    right = [tangle / name / "rows.jsonl" for name in "ab"]
    for pattern in ("**/*.jsonl", "**", "**/rows.jsonl", "*/rows.jsonl"):
        assert sources.files(str(tangle / pattern), "data.path", tangle) == right
    assert sources.files(str(tangle), "data.path", tangle) == right  # hidden ones are left out
    assert time.monotonic() - began < 5


def test_links_to_other_folders_are_followed(tangle, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "part").mkdir()
    (elsewhere / "part" / "more.jsonl").write_text("{}\n")
    (tangle / "z").symlink_to(elsewhere)
    assert tangle / "z" / "part" / "more.jsonl" in sources.files(str(tangle / "**/*.jsonl"), "data.path", tangle)


@pytest.mark.parametrize("pattern", ["**/**/*.jsonl", "a/**/b/**", "**/" * 30 + "x.jsonl"])
def test_one_search_within_another(pattern, tmp_path):
    with pytest.raises(UserError, match=r"more than one \*\*"):
        sources.files(str(tmp_path / pattern), "data.path", tmp_path)


def test_a_pattern_relative_to_the_working_directory(tangle, monkeypatch):
    monkeypatch.chdir(tangle)
    assert sources.files("**/*.jsonl", "data.path", tangle) == [Path("a/rows.jsonl"), Path("b/rows.jsonl")]
    assert sources.files("a/../**/rows.jsonl", "data.path", tangle) == [
        Path("a/../a/rows.jsonl"),
        Path("a/../b/rows.jsonl"),
    ]


ENDLESS = [r"((\w|\.)+)+!", r"(a|a)*b", r"(a|aa)+$b", r"^(([a-z])+.)+[A-Z]([a-z])+$", "(" * 30 + "a" + ")*" * 30 + "!",
           r"(?:a*)*a*a*a*a*a*a*a*a*a*a*c"]  # fmt: skip


@pytest.mark.parametrize("expression", ENDLESS)
def test_an_expression_without_end(expression):
    metric = ExactMatch(extract=expression)
    began = time.monotonic()
    try:
        assert metric("a" * 3000, "a" * 3000) in (0.0, 1.0)
    except UserError as error:
        assert "takes more than 1 s" in str(error)
    assert time.monotonic() - began < 60


@pytest.mark.parametrize("expression", ["(", "a" * 1001, "(?P<a>x)(?P<a", r"\L<words>", "(?<=a+", "[b-a]"])
def test_what_is_no_expression(expression):
    with pytest.raises(UserError, match=r"metric\.extract"):
        ExactMatch(extract=expression)


def test_a_group_that_took_no_part_is_no_answer():
    assert ExactMatch(extract="x(y)?")("x", "x") == 0.0


def test_a_row_of_a_table_over_many_lines(tmp_path):
    line = "x" * 1000 + "\n"
    with (tmp_path / "a.csv").open("w") as file:
        file.write("a,b\n")
        for row in range(3):
            file.write(f'{row},"' + line * 30_000 + '"\n')
    rows = [row for _, row in read(tmp_path / "a.csv")]
    assert [row["a"] for row in rows] == ["0", "1", "2"] and len(rows[0]["b"]) == 30_030_000
    with (tmp_path / "b.csv").open("w") as file:
        file.write('a,b\n1,"')
        for _ in range(70):
            file.write(line * 1000)
    with pytest.raises(UserError, match=r"line \d+: the row is longer than 64 MiB"):
        list(read(tmp_path / "b.csv"))


def test_many_columns_are_named_in_short(tmp_path):
    (tmp_path / "a.csv").write_text("a," * 50_000 + "a\n1\n")
    with pytest.raises(UserError) as error:
        list(read(tmp_path / "a.csv"))
    assert len(str(error.value)) < 1000
    (tmp_path / "b.csv").write_text(",".join(f"c{i}" for i in range(50_000)) + "\n1,2\n")
    ((_, refused),) = list(read(tmp_path / "b.csv"))
    assert len(str(refused)) < 1000


def test_a_report_of_many_curves_and_keys(tmp_path):
    for name in "ab":
        run = tmp_path / name
        (run / ".hydra").mkdir(parents=True)
        (run / "status.json").write_text('{"state": "finished"}')
        (run / "summary.json").write_text('{"val_loss_after": 1}')
        point = {"time": 1.0, "loss": 2.0, **{f"metric{i}": 1.0 for i in range(40_000)}}
        (run / "metrics.jsonl").write_text("".join(json.dumps({"step": i, **point}) + "\n" for i in range(2)))
        (run / "config.yaml").write_text("seed: 1\n" + "".join(f"k{i}: {name}{i}\n" for i in range(5000)))
        (run / ".hydra" / "overrides.yaml").write_text("".join(f"- k{i}={name}{i}\n" for i in range(5000)))
    began = os.times().user
    page = write_report(tmp_path).read_text()
    assert os.times().user - began < 15
    assert '"loss"' in page and '"metric400"' in page and '"metric600"' not in page
