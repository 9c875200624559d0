"""Interpolations from anybody: a few keys that refer to each other may stand for more than a memory holds.

Each of forty keys that names the next one twice makes a million million texts of the last. So there is a limit to what
one interpolation leads to, and to what a whole configuration has once all are resolved.
"""

from typing import TYPE_CHECKING

from omegaconf import DictConfig, ListConfig
from omegaconf.base import Container, Node
from omegaconf.errors import OmegaConfBaseException

from posttrain.errors import UserError

if TYPE_CHECKING:
    from omegaconf.base import DictKeyType

MOST = 40  # interpolations that one leads to; those of conf/ lead to a handful
MOST_VALUES = 10_000  # of a configuration; there are some 300
LONGEST = 1 << 20  # characters of a text that is made of others

_resolve = Container.resolve_parse_tree
_exceeded: list[str] = []  # limits, since `check` began: OmegaConf's own error doesn't say its cause
_under_way = [0, 0]  # interpolations within each other at this moment; and since the outermost one began


def register() -> None:
    """Have OmegaConf resolve within these limits; may be called again."""
    Container.resolve_parse_tree = _limited  # type: ignore[method-assign]


def _limited(
    self: Container,
    parse_tree: object,
    node: Node,
    memo: set[int] | None = None,
    key: "DictKeyType | None" = None,
) -> object:
    """As OmegaConf's own."""
    depth, before = _under_way
    done = before + 1 if depth else 1
    _under_way[:] = depth + 1, done
    if done > MOST:
        _under_way[0] = depth
        raise _exceed(f"an interpolation that leads to more than {MOST} others")
    try:
        resolved = _resolve(self, parse_tree, node, memo, key)
    finally:
        _under_way[0] = depth
    value = resolved
    if isinstance(resolved, Node) and not isinstance(resolved, Container):
        value = resolved._value()
    if isinstance(value, str) and len(value) > LONGEST:
        raise _exceed(f"an interpolation that makes a text of more than {LONGEST >> 20} MiB")
    return resolved


def _exceed(limit: str) -> UserError:
    _exceeded.append(limit)
    return UserError(limit)


def check(cfg: DictConfig) -> None:
    """Count the values of a composed configuration, `hydra` aside, as they are once resolved.

    Raises:
        UserError: they are too many, or never end.
    """
    _exceeded.clear()
    count = 0
    left: list[object] = []
    for key in cfg:
        if key != "hydra":
            left += _values(cfg, key)
    while left:
        node = left.pop()
        count += 1
        if count > MOST_VALUES:
            raise UserError(
                f"the configuration has more than {MOST_VALUES} values, those that an interpolation (${{key}}) repeats "
                "counted each time"
            )
        if not isinstance(node, DictConfig | ListConfig) or node._is_none() or node._is_missing():
            continue
        keys = list(node) if isinstance(node, DictConfig) else range(len(node))
        for key in keys:
            left += _values(node, key)


def _values(node: Container, key: "DictKeyType") -> list[object]:
    """What is under `key`, resolved; nothing where that has no value: who needs it will say so."""
    try:
        return [node[key]]
    except OmegaConfBaseException:
        if _exceeded:
            raise UserError(f"`{node._get_full_key(key)}`: {_exceeded[0]}") from None
    return []
