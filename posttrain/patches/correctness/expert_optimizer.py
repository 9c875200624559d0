"""A mixture's optimizer that is saved in one layout and loaded in another.

Megatron has an optimizer of their own for experts that are divided over processes, and one for all weights where none
are; so the same state is saved in two forms.
"""

from types import ModuleType
from typing import TYPE_CHECKING, Any

from posttrain.patches.deferred import on_import
from posttrain.patches.registry import Kind, patch, replace

if TYPE_CHECKING:
    from megatron.core.optimizer.optimizer import ChainedOptimizer

type State = dict[Any, Any]
type Group = dict[str, Any]  # of parameters, with the settings that they share

EXPERTS = "is_expert_parallel"


def regroup(loaded: State, groups: list[list[Group]], identifiers: tuple[str, ...]) -> State:
    """Give a state its optimizers' settings and steps where it was saved of several instead of one, or of one.

    Tensors are found by their names, and are in the form that was asked for. What is no tensor is in the form that was
    saved, beside it: that of several optimizers below their numbers.

    Args:
        loaded: of a checkpoint; changed.
        groups: of each optimizer that it is for.
        identifiers: the settings that tell one group from another.
    """
    numbers = sorted(key for key in loaded if isinstance(key, int))
    if not numbers or len(numbers) == len(loaded):
        return loaded
    several = [loaded.pop(number) for number in numbers]
    ours, theirs = [loaded], several
    if len(groups) > 1:
        ours, theirs = several, [loaded]
    saved = [_of_torch(part) for part in theirs]
    for part, current in zip(ours, groups, strict=True):
        _complete(_of_torch(part), current, saved, identifiers)
    if len(groups) > 1:
        return dict(zip(numbers, several, strict=True))
    return loaded


def _of_torch(part: State) -> State:
    """The state of torch's optimizer, which one for 16-bit weights has around it."""
    inner: State = part.get("optimizer", part)
    return inner


def _complete(state: State, current: list[Group], saved: list[State], identifiers: tuple[str, ...]) -> None:
    """Add the saved settings and step to one optimizer's state, whose groups have their parameters alone."""

    def identity(group: Group) -> list[object]:
        return [group.get(key) for key in identifiers if key != EXPERTS]

    known = []
    for part in saved:
        known += part["param_groups"]
    for own, group in zip(state["param_groups"], current, strict=True):
        alike = [one for one in known if identity(one) == identity(group)]
        if alike:  # else Megatron names what is missing
            own.update({key: value for key, value in alike[0].items() if key != "params"})
            own[EXPERTS] = group[EXPERTS]
    for part in saved:
        if "common_step" in part["state"]:
            state["state"]["common_step"] = part["state"]["common_step"]


def _load_either(module: ModuleType) -> None:
    optimizer = module.ChainedOptimizer
    load = optimizer.load_state_dict

    def load_either(self: "ChainedOptimizer", state_dict: Any) -> None:
        if isinstance(state_dict, dict):
            groups = [list(one.param_groups) for one in self.chained_optimizers]
            state_dict = regroup(state_dict, groups, module.param_group_identifier_keys)
        load(self, state_dict)

    replace(optimizer, load_state_dict=load_either)


@patch(
    "optimizer-of-experts",
    kind=Kind.CORRECTNESS,
    symptom="a mixture saved with expert parallelism can't be resumed without it, nor the other way around",
    versions={"megatron-core": ">=0.19,<0.20"},
)
def load_either_form() -> None:
    """Load the optimizer's state in the form that it was saved in."""
    on_import("megatron.core.optimizer.optimizer", _load_either)
