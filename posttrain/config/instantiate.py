"""Build the object of a configuration group."""

from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate

from posttrain.config import targets
from posttrain.errors import UserError


def built(node: Any) -> Any:
    """Instantiate a group; what its class says against a value is raised as it was said, without Hydra's wrapping."""
    targets.require_own(node)
    try:
        return instantiate(node)
    except InstantiationException as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        cause = " ".join(str(error.__cause__ or error).split())
        raise UserError(f"`{node._get_full_key(None)}`: {cause}") from error
