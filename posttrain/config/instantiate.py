"""Build the object of a configuration group."""

import re
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from posttrain.config import synonyms, targets, value_types
from posttrain.errors import UserError

# In Python's message and in Hydra's.
UNEXPECTED = re.compile(r"got an unexpected keyword argument '([^']+)'")
FULL_KEY = re.compile(r"full_key: (\S+)")


def built(node: object, key: str = "") -> Any:
    """Instantiate a group; what its class says against a value is raised as it was said, without Hydra's wrapping.

    Args:
        node: the group.
        key: its key path, where the object itself is needed and not what a function of it returns later.

    Raises:
        UserError: it is no mapping with a `_target_`, a value has another type than its class says, or the class
            refuses it.
    """
    if not isinstance(node, DictConfig) or node.get("_target_") is None:
        where = key or getattr(node, "_get_full_key", lambda _: "")(None)
        raise UserError(f"`{where}`: must be a mapping with a `_target_`, as the files of this group in conf/ have it")
    if key and node.get("_partial_"):
        raise UserError(f"`{key}._partial_`: builds nothing yet; remove it")
    targets.require_own(node)
    if OmegaConf.get_type(node) is dict:  # the schema has no types for it
        value_types.check(node)
    try:
        # OmegaConf's own containers would make configurations again of the objects in them.
        return instantiate(node, _convert_="partial")
    except InstantiationException as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        cause = " ".join(str(error.__cause__ or error).split())
        unknown = UNEXPECTED.search(cause)
        if unknown:
            inner = FULL_KEY.search(str(error))
            path = f"{inner[1] if inner else node._get_full_key(None)}.{unknown[1]}"
            raise UserError(f"`{path}`: unknown key{synonyms.advice_on_key(path)}") from error
        raise UserError(f"`{node._get_full_key(None)}`: {cause}") from error
    except TypeError as error:  # Hydra's own, of its flags: `_partial_: text`
        raise UserError(f"`{node._get_full_key(None)}`: {' '.join(str(error).split())}") from error
