"""Passwords and tokens stay out of configurations: those are written to files, logs and trackers."""

import os
import re
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.resolvers import oc

from posttrain.errors import UserError

NAMES = re.compile(
    r"TOKEN(?!IZ)|SECRET|PASSW|PASSPHRASE|CREDENTIAL|COOKIE|(^|_)(API_?KEY|KEY|AUTH|PAT)(_|$)", re.IGNORECASE
)
VALUES = {
    "a Hugging Face token": r"\bhf_[A-Za-z0-9]{30,}",
    "a GitHub token": r"\bgh[pousr]_[A-Za-z0-9]{36,}|\bgithub_pat_\w{50,}",
    "an API key": r"\bsk-[A-Za-z0-9_-]{32,}",
    "an AWS key": r"\bAKIA[A-Z0-9]{16}\b",
    "a Slack token": r"\bxox[abprs]-[A-Za-z0-9-]{20,}",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "a password in an address": r"\b[a-z][a-z0-9+.-]*://[^/\s:@]+:[^/\s@]+@",
}
KINDS = [(kind, re.compile(pattern)) for kind, pattern in VALUES.items()]


def env(name: str, default: Any = oc._DEFAULT_MARKER_) -> Any:
    """OmegaConf's `oc.env`, closed for variables that hold a secret.

    Raises:
        UserError: for one of those.
    """
    refuse_variable(str(name), f"${{oc.env:{name}}}")
    return oc.env(name) if default is oc._DEFAULT_MARKER_ else oc.env(name, default)


def refuse_variable(name: str, written: str) -> None:
    """Refuse the environment variable `name` where its name or its value say that it is a secret.

    Args:
        written: how the configuration refers to it, for the error.

    Raises:
        UserError: not repeating the value.
    """
    if NAMES.search(name) or _kind(os.environ.get(name, "")):
        raise UserError(f"{written}: a secret has no place in a configuration, which is written to files")


def register() -> None:
    """Put `env` in the place of OmegaConf's."""
    OmegaConf.register_new_resolver("oc.env", env, replace=True)


def check(node: Any, path: str = "") -> None:
    """Refuse values that look like secrets, or that are the value of a secret environment variable.

    Raises:
        UserError: naming the key, not the value.
    """
    secrets = {value: name for name, value in os.environ.items() if NAMES.search(name) and len(value) >= 16}
    for where, value in _texts(OmegaConf.to_container(node, resolve=True) if _is_config(node) else node, path):
        kind = _kind(value) or next((f"the value of ${secrets[s]}" for s in secrets if s in value), None)
        if kind:
            raise UserError(
                f"`{where}`: holds {kind}, and a configuration is written to files, logs and trackers; libraries take "
                "secrets from environment variables (HF_TOKEN, WANDB_API_KEY) or their own login"
            )


def _kind(value: str) -> str | None:
    """What kind of secret a text holds by its looks."""
    return next((kind for kind, pattern in KINDS if pattern.search(value)), None)


def _is_config(node: Any) -> bool:
    return isinstance(node, DictConfig | ListConfig)


def _texts(value: Any, path: str) -> Any:
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _texts(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _texts(item, f"{path}[{index}]")
