"""The small tokenizer of the data's tests."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "data"))
