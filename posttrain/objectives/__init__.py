"""What is trained for: the objects of the config group `objective`. No torch at import."""

from posttrain.objectives.objective import Objective
from posttrain.objectives.sft import SFT

__all__ = ["SFT", "Objective"]
