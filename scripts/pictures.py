"""The pictures of README and docs/report.md, made of what commands really show.

python scripts/pictures.py preview             docs/pictures/preview.svg, of a preview in colour
python scripts/pictures.py report SWEEP        docs/pictures/report.png, of a sweep's page; needs Chromium, Pillow
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).resolve().parent.parent
PICTURES = ROOT / "docs" / "pictures"
COLUMNS = 92
CHAT = [
    {"role": "user", "content": "Which planet has the most moons?"},
    {"role": "assistant", "content": "Saturn, with more than 270 known ones."},
    {"role": "user", "content": "And which has none?"},
    {"role": "assistant", "content": "Mercury and Venus have none."},
]
OPTIONS = ["data=messages", "data.path=chats.jsonl"]
# The page down to its heat map.
PAGE_SIZE = (1300, 2170)
COLORS = 96  # of the picture's palette: charts on a plain ground need no more


def picture_preview() -> None:
    """Run the preview of two turns in colour."""
    command = ["python", "-m", "posttrain.preview", *OPTIONS]
    env = os.environ | {"FORCE_COLOR": "1", "TERM": "xterm-256color", "COLUMNS": str(COLUMNS), "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "chats.jsonl").write_text(json.dumps({"messages": CHAT}) + "\n")
        shown = subprocess.run([sys.executable, *command[1:]], cwd=folder, env=env, capture_output=True, text=True)
    shown.check_returncode()
    with open(os.devnull, "w") as nowhere:
        console = Console(record=True, width=COLUMNS, file=nowhere)
        console.print(f"[bold]$ {' '.join(command)}[/]", highlight=False)
        console.print(Text.from_ansi(shown.stdout))
    svg = console.export_svg(title="what is trained on: green")
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)  # rich's fonts would be loaded from a network
    (PICTURES / "preview.svg").write_text(svg)


def picture_report(sweep: Path) -> None:
    """Have a browser draw the page of a sweep."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        raise SystemExit("no Chromium on this machine")
    width, height = PAGE_SIZE
    with tempfile.TemporaryDirectory() as folder:
        drawn = Path(folder) / "page.png"
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=4000"]
        options += [f"--window-size={width},{height}", f"--screenshot={drawn}", f"--user-data-dir={folder}/profile"]
        page = (sweep / "report.html").resolve().as_uri()
        subprocess.run([browser, *options, page], check=True, capture_output=True)
        picture = Image.open(drawn).convert("RGB").quantize(COLORS, dither=Image.Dither.NONE)
        picture.save(PICTURES / "report.png", optimize=True)


def main() -> None:
    """Make one of the pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("picture", choices=["preview", "report"])
    parser.add_argument("sweep", type=Path, nargs="?", help="directory of a sweep that has a report")
    args = parser.parse_args()
    if args.picture == "preview":
        picture_preview()
    elif args.sweep is None:
        parser.error("report: give the directory of a sweep")
    else:
        picture_report(args.sweep)


if __name__ == "__main__":
    main()
