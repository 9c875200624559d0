"""A patch: one change to upstream behaviour, with its reason, its versions and where it is needed."""

from types import ModuleType

from posttrain.patches import Kind, patch
from posttrain.patches.deferred import on_import
from posttrain.patches.registry import on_cpu


@patch(
    "quiet-optimizer",
    kind=Kind.STARTUP,
    symptom="Megatron logs the optimizer's whole configuration, 1,600 characters in one line, for each one it makes",
    versions={"megatron-core": ">=0.19,<0.20"},
    when=on_cpu,
)
def quiet_optimizer() -> None:
    """Shorten that line to its beginning."""

    def shorten(module: ModuleType) -> None:
        plain = module.log_single_rank

        def short(logger, level, message, *args, **options):
            plain(logger, level, message if len(message) < 200 else f"{message[:80]}...", *args, **options)

        module.log_single_rank = short

    on_import("megatron.core.optimizer", shorten)
