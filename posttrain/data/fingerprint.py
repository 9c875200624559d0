"""Names for cached data: a digest of everything that changes its content."""

import hashlib
import inspect
import json
import time
from collections.abc import Sequence
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.utils.atomic_files import write_json
from posttrain.utils.cache import check_private, make_private

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_PACKAGE = Path(__file__).parent


def digest(parts: object) -> str:
    """32 hex digits of a JSON-able value; objects in it count by their class and attributes."""
    text = json.dumps(parts, sort_keys=True, default=_described)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _described(value: object) -> Any:
    if callable(value) and not hasattr(value, "__dataclass_fields__"):
        call = value if isinstance(value, partial) else partial(value)
        file = inspect.getsourcefile(call.func)
        content = hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else ""
        return [call.func.__qualname__, content, call.args, call.keywords]
    if hasattr(value, "items"):
        return dict(value.items())
    if isinstance(value, Sequence):
        return list(value)
    return [type(value).__qualname__, vars(value)]


@cache
def code() -> str:
    """A digest of this package's source and of the libraries that decide ids."""
    found = hashlib.sha256()
    for file in sorted(_PACKAGE.rglob("*.py")):
        found.update(file.read_bytes())
    for name in ("tokenizers", "jinja2", "pyarrow"):
        found.update(version(name).encode())
    return found.hexdigest()


def tokenizer(tok: "PreTrainedTokenizerFast") -> str:
    """A digest of a tokenizer's Rust core and special tokens."""
    found = hashlib.sha256(tok.backend_tokenizer.to_str().encode())
    found.update(json.dumps(tok.special_tokens_map, sort_keys=True, default=str).encode())
    return found.hexdigest()


def files_beside(paths: Sequence[Path], cache: Path) -> list[str]:
    """Digests of the files' contents, remembered in the folder `cache` of prepared rows.

    Raises:
        UserError: others may write to the cache.
    """
    memo = cache / "files.json"
    check_private(memo)
    make_private(cache)
    return files(paths, memo)


def files(paths: Sequence[Path], memo: Path) -> list[str]:
    """Digests of the files' contents.

    A large file is read once: its digest is remembered in `memo` with its size and time of change. A file changed less
    than two seconds ago isn't remembered: it might change again within the clock's resolution.
    """
    try:
        known = json.loads(memo.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        known = {}
    if not isinstance(known, dict):
        known = {}
    found, fresh = [], {}
    for path in paths:
        stat = path.stat()
        key = f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}|{stat.st_ino}"
        value = known.get(key)
        if value is None:
            with path.open("rb") as file:
                value = hashlib.file_digest(file, "sha256").hexdigest()
            if time.time() - stat.st_mtime > 2:
                fresh[key] = value
        found.append(value)
    if fresh:
        memo.parent.mkdir(parents=True, exist_ok=True)
        write_json(memo, {**known, **fresh})
    return found
