"""posttrain: Hydra-composed post-training of language models on Megatron-Bridge and Megatron-Core."""

import importlib.util
import sys

from posttrain.utils.version import VERSION as __version__

__all__ = ["__version__"]

# `python -m posttrain...` with another Python than the environment's; at this moment Python calls the program "-m".
if sys.argv[:1] == ["-m"] and importlib.util.find_spec("hydra") is None:
    print(
        f"posttrain: {sys.executable} is not the Python of posttrain's environment (it has no hydra): activate that "
        "(source .venv/bin/activate), or make it with `make setup`",
        file=sys.stderr,
    )
    raise SystemExit(2)
if sys.argv[:1] == ["-m"]:
    from posttrain.utils import terminal

    terminal.begin_module()
