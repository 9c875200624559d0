"""What can be known to be wrong with `data` and `template` before a tokenizer is loaded. Imports nothing heavy."""

from pathlib import Path
from typing import Any

from posttrain import targets
from posttrain.data.sft import SFTData
from posttrain.data.templates import ChatTemplate
from posttrain.errors import UserError


def check(cfg: Any) -> tuple[SFTData, ChatTemplate]:
    """Build the objects of both groups and look for the files they name.

    Raises:
        UserError: a value is wrong, or a local file is not there.
    """
    data, template = built(cfg.data), built(cfg.template)
    if isinstance(data, SFTData):
        data.rules(cfg.trainer.seq_length)
        for path, key in data.paths():
            for one in [path] if isinstance(path, str) else path:
                _look_for(str(one), key)
    if isinstance(template, ChatTemplate) and template.file is not None:
        template.read()
    return data, template


def built(node: Any) -> Any:
    """Instantiate a group; what its class says against a value is raised as it was said, without Hydra's wrapping."""
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    targets.require_own(node)
    try:
        return instantiate(node)
    except InstantiationException as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        cause = " ".join(str(error.__cause__ or error).split())
        raise UserError(f"`{node._get_full_key(None)}`: {cause}") from error


def _look_for(path: str, key: str) -> None:
    from posttrain.data import sources

    if path.startswith((sources.HUB, "demo:")):
        return
    sources.files(path, key, Path())
