"""Write the results of tests/e2e/test_gpu_layouts.py into the table of docs/parallelism.md.

POSTTRAIN_LAYOUTS=layouts.jsonl pytest -m gpu tests/e2e/test_gpu_layouts.py
python scripts/layout_table.py layouts.jsonl

Of several files, as of tests that were run in parts, what a later one has counts.
"""

import json
import sys
from pathlib import Path

PAGE = Path(__file__).resolve().parent.parent / "docs" / "parallelism.md"
BEGIN, END = "<!-- layouts on GPUs, written by scripts/layout_table.py -->\n", "<!-- end of layouts on GPUs -->"
TRAINED = {
    "lora": "LoRA",
    "dora": "DoRA",
    "canonical": "canonical LoRA",
    "all": "all weights",
    "fp8": "LoRA, fp8",
    "all_bf16_adam": "all weights, `adam_bf16`",
}


def table(rows: list[dict]) -> str:
    """A line for each model and layout: how far its losses are from one GPU's, by what is trained."""
    lines: dict[tuple[str, str, int], dict[str, dict]] = {}
    for row in rows:
        layout = ", ".join(f"`{word}`" for word in [row["layout"], *row["more"]])
        lines.setdefault((row["model"], layout, row["processes"]), {})[row["trained"]] = row
    text = f"| model | layout | processes | step captured | {' | '.join(TRAINED.values())} |\n"
    text += "|---|---|---|---|" + "---|" * len(TRAINED) + "\n"
    for (model, layout, processes), found in lines.items():
        captured = "no"
        if found.get("lora", next(iter(found.values())))["captured"]:
            captured = "yes"
        values = [cell(found.get(trained)) for trained in TRAINED]
        text += f"| {model} | {layout} | {processes} | {captured} | {' | '.join(values)} |\n"
    return text


def cell(row: dict | None) -> str:
    """The largest difference of a loss; empty: not run."""
    if row is None:
        return ""
    if row["off"] is None:
        return "fails"
    return f"{row['off']:.0e}"


def main() -> None:
    """Replace the table."""
    rows = []
    for path in sys.argv[1:]:
        rows += [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    before, _, rest = PAGE.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text(before + BEGIN + table(rows) + END + after)


if __name__ == "__main__":
    main()
