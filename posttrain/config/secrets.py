"""Passwords and tokens stay out of configurations: those are written to files, logs and trackers."""

import os
import re
from collections.abc import Iterator

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.resolvers import oc

from posttrain.errors import UserError

NAMES = re.compile(
    r"TOKEN(?!IZ)|SECRET|PASSW|PASSPHRASE|CREDENTIAL|COOKIE|(^|_)(API_?KEY|KEY|AUTH|PAT)(_|$)", re.IGNORECASE
)
KINDS = {
    "a Hugging Face token": r"\bhf_[A-Za-z0-9]{30,}",
    "a GitHub token": r"\bgh[pousr]_[A-Za-z0-9]{36,}|\bgithub_pat_\w{50,}",
    "an API key": r"\bsk-[A-Za-z0-9_-]{32,}",
    "an AWS key": r"\bAKIA[A-Z0-9]{16}\b",
    "a Slack token": r"\bxox[abprs]-[A-Za-z0-9-]{20,}",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "a password in an address": r"\b[a-z][a-z0-9+.-]*://[^/\s:@]+:[^/\s@]+@",
}
LEAST = 16  # characters of a secret variable's value that is looked for in a configuration
_NO_DEFAULT = object()


def env(name: str, default: object = _NO_DEFAULT) -> str | None:
    """OmegaConf's `oc.env`, closed for variables that hold a secret.

    Raises:
        UserError: for one of those.
    """
    refuse_variable(str(name), f"${{oc.env:{name}}}")
    if default is _NO_DEFAULT:
        return oc.env(name)
    return oc.env(name, default)


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


def check(node: object, path: str = "") -> None:
    """Refuse values that look like secrets, or that are the value of a secret environment variable.

    Raises:
        UserError: naming the key, not the value.
    """
    values = node
    if isinstance(node, DictConfig | ListConfig):
        values = OmegaConf.to_container(node, resolve=True)
    secrets = _secret_variables()
    for where, text in _texts(values, path):
        kind = _kind(text) or _variable_in(text, secrets)
        if kind:
            raise UserError(
                f"`{where}`: holds {kind}, and a configuration is written to files, logs and trackers; libraries take "
                "secrets from environment variables (HF_TOKEN, WANDB_API_KEY) or their own login"
            )


def _kind(value: str) -> str | None:
    """What kind of secret a text holds by its looks."""
    for kind, pattern in KINDS.items():
        if re.search(pattern, value):
            return kind
    return None


def _secret_variables() -> dict[str, str]:
    """Value -> name of the environment variables that hold secrets."""
    secrets = {}
    for name, value in os.environ.items():
        if NAMES.search(name) and len(value) >= LEAST:
            secrets[value] = name
    return secrets


def _variable_in(text: str, secrets: dict[str, str]) -> str | None:
    """Which variable's value a text holds."""
    for value, name in secrets.items():
        if value in text:
            return f"the value of ${name}"
    return None


def _texts(value: object, path: str) -> Iterator[tuple[str, str]]:
    """(key path, text) of every text at or below `value`."""
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _texts(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _texts(item, f"{path}[{index}]")
