"""The table of model families in docs/index.md, from what their tests say.

    python scripts/family_table.py [--junit results.xml]

Runs `pytest tests/models` (three minutes on two cores) unless its JUnit results are given, and rewrites the lines of
docs/index.md between the two markers.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- families: scripts/family_table.py -->", "<!-- end of families -->"
NAMES = {
    "llama": "Llama 1, 2, 3",
    "llama31": "Llama 3.1, 3.3",
    "llama32": "Llama 3.2",
    "mistral": "Mistral",
    "mixtral": "Mixtral",
    "gemma": "Gemma",
    "gemma2": "Gemma 2",
    "qwen2": "Qwen2, Qwen2.5",
    "qwen3": "Qwen3",
    "qwen3_moe": "Qwen3-MoE",
    "gpt2": "GPT-2",
    "gpt_neox": "GPT-NeoX, Pythia",
    "gpt_neox_sequential": "GPT-NeoX, sequential residual",
}
# Column -> the test ids that must all have passed; {f} is the family.
COLUMNS = {
    "import": ["test_logits[{f}]", "test_step_on_packed_sequences[{f}]"],
    "export": ["test_export_is_bit_identical[{f}]"],
    "full": ["test_loss_curve[{f}-full]"],
    "LoRA": ["test_loss_curve[{f}-lora]", "test_adapter_exported_and_merged[{f}-megatron_names]"],
    "TP=2": ["test_step_on_two_processes[tp2_sp-{f}]", "test_adapter_exported_from_two_processes[tp2_sp-{f}]"],
    "PP=2": ["test_step_on_two_processes[pp2-{f}]", "test_adapter_exported_from_two_processes[pp2-{f}]"],
    "EP=2": ["test_step_on_two_processes[ep2-{f}]", "test_adapter_exported_from_two_processes[ep2-{f}]"],
}


def read(path: Path) -> tuple[dict[str, str], dict[str, float]]:
    """Outcome by test id, and the recorded error by test id, of a JUnit file."""
    outcomes, errors = {}, {}
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        bad = {child.tag for child in case} & {"failure", "error", "skipped"}
        outcomes[case.get("name")] = "no" if bad else "yes"
        for item in case.iter("property"):
            if item.get("name") == "error":
                errors[case.get("name")] = float(item.get("value"))
    return outcomes, errors


def table(outcomes: dict[str, str], errors: dict[str, float]) -> str:
    """The Markdown table: yes, no, or - where there is no such test."""
    lines = [f"| family | {' | '.join(COLUMNS)} | loss against Transformers, 20 steps |",
             "|" + "---|" * (len(COLUMNS) + 2)]  # fmt: skip
    for family, name in NAMES.items():
        cells = []
        for tests in COLUMNS.values():
            found = [outcomes.get(test.format(f=family)) for test in tests]
            cells.append("-" if None in found else "no" if "no" in found else "yes")
        worst = max(errors[f"test_loss_curve[{family}-{method}]"] for method in ("full", "lora"))
        lines.append(f"| {name} | {' | '.join(cells)} | {worst:.0e} |")
    return "\n".join(lines)


def main() -> None:
    """Run the tests if need be, rewrite the page."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--junit", type=Path, help="results of an earlier run")
    junit = options.parse_args().junit
    with tempfile.TemporaryDirectory() as folder:
        if junit is None:
            junit = Path(folder) / "results.xml"
            subprocess.run([sys.executable, "-m", "pytest", "-q", "tests/models", f"--junitxml={junit}"], cwd=ROOT)
        text = table(*read(junit))
    page = ROOT / "docs" / "index.md"
    pattern = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), re.DOTALL)
    page.write_text(pattern.sub(lambda _: f"{BEGIN}\n{text}\n{END}", page.read_text()))
    print(text)


if __name__ == "__main__":
    main()
