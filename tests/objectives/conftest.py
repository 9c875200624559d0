"""Modules of the other folders that these tests share."""

import sys
from pathlib import Path

for folder in ("data", "models"):
    sys.path.insert(0, str(Path(__file__).parents[1] / folder))
