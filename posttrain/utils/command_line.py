"""The command line of this process as it was typed, to be typed again."""

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

from posttrain.utils.escape import escape_control


def typed_command(overrides: Mapping[str, str]) -> str:
    """What to type for this command again, quoted for a shell, with some values changed.

    Args:
        overrides: key -> value, both as they are typed; they replace what was typed for these keys.
    """
    words = list(sys.orig_argv)
    is_script = len(words) > 1 and Path(words[1]).parent == Path(sys.executable).parent
    if is_script:  # the `posttrain` script, which names its Python itself
        words = words[1:]
    kept = [word for word in words if word.lstrip("+").partition("=")[0] not in overrides]
    kept += [f"{key}={value}" for key, value in overrides.items()]
    return escape_control(shlex.join(kept))
