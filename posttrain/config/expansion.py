"""Interpolations from anybody: a few keys that refer to each other may stand for more than a memory holds.

Each of forty keys that names the next one twice makes a million million texts of the last. So there is a limit to what
one interpolation leads to, and to what a whole configuration has once all are resolved.
"""

from typing import Any

from omegaconf import DictConfig, ListConfig
from omegaconf.base import Container, Node
from omegaconf.errors import OmegaConfBaseException

from posttrain.errors import UserError

MOST = 40  # interpolations that one leads to; those of conf/ lead to a handful
MOST_VALUES = 10_000  # of a configuration; there are some 300
LONGEST = 1 << 20  # characters of a text that is made of others

_resolve = Container.resolve_parse_tree
_met: list[str] = []  # limits, since `check` began: OmegaConf's own error doesn't say its cause
_under_way = [0, 0]  # interpolations within each other at this moment; and since the outermost one began


def register() -> None:
    """Have OmegaConf resolve within these limits; may be called again."""
    Container.resolve_parse_tree = _limited


def _limited(self: Container, *args: Any, **kwargs: Any) -> Any:
    depth, before = _under_way
    done = before + 1 if depth else 1
    _under_way[:] = depth + 1, done
    if done > MOST:
        _under_way[0] = depth
        raise _too_much(f"an interpolation that leads to more than {MOST} others")
    try:
        found = _resolve(self, *args, **kwargs)
    finally:
        _under_way[0] = depth
    text = found._value() if isinstance(found, Node) and not isinstance(found, Container) else found
    if isinstance(text, str) and len(text) > LONGEST:
        raise _too_much(f"an interpolation that makes a text of more than {LONGEST >> 20} MiB")
    return found


def _too_much(why: str) -> UserError:
    _met.append(why)
    return UserError(why)


def check(cfg: DictConfig) -> None:
    """Count the values of a composed configuration, `hydra` aside, as they are once resolved.

    Raises:
        UserError: they are too many, or never end.
    """
    _met.clear()
    count, left = 0, [node for key in cfg if key != "hydra" for node in _values(cfg, key)]
    while left:
        node = left.pop()
        count += 1
        if count > MOST_VALUES:
            raise UserError(
                f"the configuration has more than {MOST_VALUES} values, those that an interpolation (${{key}}) repeats "
                "counted each time"
            )
        if isinstance(node, DictConfig | ListConfig) and not node._is_none() and not node._is_missing():
            for key in node if isinstance(node, DictConfig) else range(len(node)):
                left += _values(node, key)


def _values(node: DictConfig | ListConfig, key: Any) -> list[Any]:
    """What is under `key`, resolved; nothing where that has no value: who needs it will say so."""
    try:
        return [node[key]]
    except OmegaConfBaseException:
        if _met:
            raise UserError(f"`{node._get_full_key(key)}`: {_met[0]}") from None
    return []
