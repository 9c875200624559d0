"""What is trained for: the objects of the config group `objective`. No torch at import."""

from posttrain.objectives.objective import Objective
from posttrain.objectives.sft import SFT
from posttrain.objectives.text import Text

__all__ = ["SFT", "Objective", "Text"]
