"""Write the results of tests/e2e/test_gpu_layouts.py into the table of docs/parallelism.md.

POSTTRAIN_LAYOUTS=layouts.jsonl pytest -m gpu tests/e2e/test_gpu_layouts.py
python scripts/layout_table.py layouts.jsonl
"""

import json
import sys
from pathlib import Path

PAGE = Path(__file__).resolve().parent.parent / "docs" / "parallelism.md"
BEGIN, END = "<!-- layouts on GPUs, written by scripts/layout_table.py -->\n", "<!-- end of layouts on GPUs -->"
TRAINED = {"lora": "LoRA", "dora": "DoRA", "canonical": "canonical LoRA", "all": "all weights", "fp8": "LoRA, fp8"}


def table(rows: list[dict]) -> str:
    """A line for each model and layout: how far its losses are from one GPU's, by what is trained."""
    lines = {}
    for row in rows:
        captured, cells = lines.setdefault((row["model"], row["layout"]), (row["captured"], {}))
        cells[row["trained"]] = "fails" if row["off"] is None else f"{row['off']:.0e}"
    text = f"| model | layout | step captured | {' | '.join(TRAINED.values())} |\n"
    text += "|---|---|---|" + "---|" * len(TRAINED) + "\n"
    for (model, layout), (captured, cells) in lines.items():
        values = [cells.get(trained, "") for trained in TRAINED]
        text += f"| {model} | `{layout}` | {'yes' if captured else 'no'} | {' | '.join(values)} |\n"
    return text


def main() -> None:
    """Replace the table."""
    rows = [json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()]
    before, _, rest = PAGE.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text(before + BEGIN + table(rows) + END + after)


if __name__ == "__main__":
    main()
