"""What all pages share: one HTML file that requires neither a network nor a second file, whoever's texts are in it."""

import base64
import hashlib
import json
import time
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from posttrain.config.composition import compose
from posttrain.config.containers import as_dict
from posttrain.config.trial_names import flatten, is_run_local
from posttrain.report.comparison import format_setting, format_value
from posttrain.report.facts import SETTINGS, Fact
from posttrain.report.trials import Trial
from posttrain.utils.durations import format_duration
from posttrain.utils.escape import escape_control, shorten

FOLDER = Path(__file__).parent

Changes = list[tuple[str, str, str]]  # (key, default, value)


def render(template: str, data: dict[str, Any], **values: object) -> str:
    """Return a page.

    Args:
        template: of this folder.
        data: for page.js, as JSON.
        values: for the template.
    """
    environment = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_escaped,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = (FOLDER / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template(template).render(
        data=json.dumps(data, allow_nan=False).replace("<", "\\u003c"),  # so that no text can end the script
        script=script,
        script_hash=f"sha256-{digest}",
        style=(FOLDER / "page.css").read_text(encoding="utf-8"),
        made=time.strftime("%Y-%m-%d %H:%M"),
        format_value=format_value,
        format_duration=format_duration,
        shorten=shorten,
        **values,
    )


def tiles(facts: list[Fact]) -> list[Fact]:
    """The facts that a page doesn't say elsewhere, as it says state, settings, export and commands."""
    elsewhere = ("state", "export", "again")
    return [fact for fact in facts if fact.name not in SETTINGS and not fact.name.endswith(elsewhere)]


def changed_keys(trial: Trial) -> Changes:
    """What differs from the defaults, where a run is run aside: that of the command line first.

    Keys of the defaults that the configuration doesn't have belong to a group's other choice and are left out.
    """
    defaults = _defaults()
    changed: Changes = []
    for key, value in trial.config.items():
        if not is_run_local(key) and value != defaults.get(key):
            default = format_setting(defaults[key]) if key in defaults else ""
            changed.append((key, default, format_setting(value)))
    for key, text in trial.choices.items():
        if key not in trial.config and "." not in key and not is_run_local(key):  # a group: the file that was chosen
            changed.append((key, "", text))
    return sorted(changed, key=lambda change: not is_chosen(change[0], trial))


def is_chosen(key: str, trial: Trial) -> bool:
    """Whether the command line says it: itself, or a mapping that it is in."""
    parts = key.split(".")
    above = [".".join(parts[:length]) for length in range(2, len(parts))]
    return key in trial.choices or any(name in trial.choices for name in above)


@cache
def _defaults() -> dict[str, Any]:
    return flatten(as_dict(compose()))


def _escaped(value: object) -> object:
    """A text or path of a run with its control characters made visible; markup is left as it is."""
    if isinstance(value, Path):
        value = str(value)
    return escape_control(value) if type(value) is str else value
