"""What can be known to be wrong with `data` and `template` before a tokenizer is loaded. Imports nothing heavy."""

from pathlib import Path

from omegaconf import DictConfig

from posttrain.config.instantiate import built
from posttrain.data import readers, row_filter, sources
from posttrain.data.templates import ChatTemplate
from posttrain.data.training_data import TrainingData
from posttrain.errors import UserError


def check(cfg: DictConfig) -> tuple[TrainingData, ChatTemplate]:
    """Build the objects of both groups and look for the files they name.

    Raises:
        UserError: a value is wrong, or a local file is not there.
    """
    data, template = built(cfg.data, "data"), built(cfg.template, "template")
    if isinstance(data, TrainingData):
        for source in data.all_sources():
            _look_for(source)
    elif not hasattr(data, "build"):
        raise UserError("`data`: builds no data; its `_target_` must be a class, without `_partial_`")
    if isinstance(template, ChatTemplate) and template.file is not None:
        template.read()
    elif not hasattr(template, "source"):
        raise UserError("`template`: is no template; its `_target_` must be a class, without `_partial_`")
    return data, template


def _look_for(source: sources.Source) -> None:
    """The source's files are there, and the expression that chooses rows is one."""
    if source.where is not None:
        row_filter.compile_where(source.where)
    for one in [source.path] if isinstance(source.path, str) else source.path:
        if not one.startswith((readers.HUB, "demo:")):
            sources.files(one, source.key, Path(), source.kinds)


def check_hub(data: TrainingData) -> None:
    """Ask the hub for the data sets that are its own.

    Raises:
        UserError: it doesn't give one of them to this user, or doesn't answer in time.
    """
    for source in data.all_sources():
        for path in [source.path] if isinstance(source.path, str) else source.path:
            if path.startswith(readers.HUB):
                from posttrain.data import hub_datasets  # loads `huggingface_hub`

                hub_datasets.revision(path, source.key)
