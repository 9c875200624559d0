"""Rows for a grid over files: good ones, some cut off, some that teach other answers than are validated."""

import json
from pathlib import Path

from posttrain.spec import first_rows

# Overrides of such a grid, beside data.path; paths are relative to the folder of the rows.
VALIDATED = ("data.validation_fraction=null", "data.validation_path=validation.jsonl", "trainer.validation_interval=1")
ERROR = "cut.jsonl, line 80: not valid JSON"


def write(directory: Path) -> None:
    """Write good.jsonl, cut.jsonl, poor.jsonl, validation.jsonl."""
    for name, answer in {"good": "hello world", "cut": "hello world", "poor": "QQQQ ZZZZ"}.items():
        (directory / f"{name}.jsonl").write_text(_rows(answer))
    (directory / "validation.jsonl").write_text(_rows("hello world"))
    cut = directory / "cut.jsonl"
    cut.write_text(cut.read_text()[:-30])  # its last line, which the first look doesn't reach


def _rows(answer: str) -> str:
    lines = []
    for number in range(first_rows.FIRST + 16):
        turns = [{"role": "user", "content": f"say {number}"}, {"role": "assistant", "content": f"{answer} {number}"}]
        lines.append(json.dumps({"messages": turns}))
    return "\n".join(lines)
