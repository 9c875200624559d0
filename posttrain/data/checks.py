"""What can be known to be wrong with `data` and `template` before a tokenizer is loaded. Imports nothing heavy."""

from pathlib import Path
from typing import Any

from posttrain.config.instantiate import built
from posttrain.data.sft import SFTData
from posttrain.data.templates import ChatTemplate
from posttrain.errors import UserError


def check(cfg: Any) -> tuple[SFTData, ChatTemplate]:
    """Build the objects of both groups and look for the files they name.

    Raises:
        UserError: a value is wrong, or a local file is not there.
    """
    data, template = built(cfg.data, "data"), built(cfg.template, "template")
    if isinstance(data, SFTData):
        data.rules(cfg.trainer.seq_length)
        for path, key in data.paths():
            for one in [path] if isinstance(path, str) else path:
                _look_for(str(one), key)
        for form, key in data.formats():
            if not hasattr(form, "conversations") and not hasattr(form, "read"):
                raise UserError(f"`{key}`: is no format; name one of posttrain.data.formats, or one of your own")
    elif not hasattr(data, "build"):
        raise UserError("`data`: builds no data; its `_target_` must be a class, without `_partial_`")
    if isinstance(template, ChatTemplate) and template.file is not None:
        template.read()
    elif not hasattr(template, "source"):
        raise UserError("`template`: is no template; its `_target_` must be a class, without `_partial_`")
    return data, template


def _look_for(path: str, key: str) -> None:
    from posttrain.data import sources

    if path.startswith((sources.HUB, "demo:")):
        return
    sources.files(path, key, Path())
