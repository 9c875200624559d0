"""The small models are those of the model tests."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "models"))
