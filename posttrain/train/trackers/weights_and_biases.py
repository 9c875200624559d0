"""Weights & Biases."""

import os
import secrets
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from posttrain.errors import UserError
from posttrain.train.trackers.tracker import TrackedRun, Tracker
from posttrain.utils import rundir

WANDB_ID = "wandb.json"  # in a run directory
Mode = Literal["online", "offline", "disabled"]
MODES: tuple[Mode, ...] = get_args(Mode)
HARMLESS = ("project", "mode", "disabled")  # of wandb's settings: Wandb gives the first two itself


@dataclass
class Wandb(Tracker):
    """Weights & Biases; `mode=offline` needs no account and leaves RUN_DIR/wandb.

    What is None is taken from wandb's own environment variables.
    """

    project: str | None = None
    entity: str | None = None
    mode: Mode | None = None
    group: str | None = None
    tags: Sequence[str] | None = None

    @property
    def effective_mode(self) -> Mode:
        """Online unless the configuration or WANDB_MODE says otherwise.

        Raises:
            UserError: there is no such mode.
        """
        mode = self.mode or os.environ.get("WANDB_MODE") or "online"
        for known in MODES:
            if mode == known:
                return known
        name = "logger.wandb.mode" if self.mode else "WANDB_MODE"
        raise UserError(f"{name}={mode}: must be one of {', '.join(MODES)}")

    def check(self) -> None:
        """See that there is an account; nothing is sent.

        Raises:
            UserError: a run would be sent, and there is no key for it; or there is no such mode.
        """
        if self.effective_mode != "online" or os.environ.get("WANDB_API_KEY"):
            return
        import wandb
        from wandb.sdk.lib.wbauth import read_netrc_auth

        refuse_workspace()
        settings = wandb.setup().settings
        if settings.api_key or settings.identity_token_file or read_netrc_auth(host=str(settings.base_url)):
            return
        raise UserError(
            f"logger=wandb: there is no account for {settings.base_url}: log in with `wandb login`, or set "
            "WANDB_API_KEY; or keep the run on this machine with logger.wandb.mode=offline (WANDB_MODE=offline)"
        )

    def start(self, run: TrackedRun) -> None:
        """Begin the run, or continue it under the id that it has in wandb, where later steps than it has are added.

        Raises:
            UserError: a file in the working directory says where it is sent.
        """
        import wandb

        refuse_workspace()
        host = str(wandb.setup().settings.base_url)
        if host != wandb.Settings.model_fields["base_url"].default and self.effective_mode == "online":
            self.notice = f"wandb: the run is sent to {host}"
        run_id = run.known_id(WANDB_ID)
        if run_id is None:
            run_id = secrets.token_hex(4)
            rundir.write_json(run.directory, WANDB_ID, {"id": run_id})
        self.run = wandb.init(
            id=run_id,
            resume="allow",
            project=self.project or os.environ.get("WANDB_PROJECT") or "posttrain",
            entity=self.entity,
            mode=self.effective_mode,
            group=self.group or os.environ.get("WANDB_RUN_GROUP") or run.group,
            tags=None if self.tags is None else list(self.tags),
            name=run.name,
            dir=str(run.directory.absolute()),
            config=run.recorded_config,
            settings=wandb.Settings(console="off", silent=True),
        )

    def log(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def table(self, step: int, name: str, rows: list[dict[str, str]]) -> None:
        import wandb

        table = wandb.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])
        self.run.log({name: table}, step=step)

    def finish(self, summary: dict[str, Any]) -> str | None:
        self.run.summary.update(summary)
        self.run.finish()
        if self.effective_mode == "offline":
            folder = Path(self.run.dir).parent
            return f"wandb: kept in {folder}; to send it: wandb sync {shlex.quote(str(folder))}"
        return f"wandb: {self.run.url}" if self.run.url else None


def refuse_workspace() -> None:
    """Refuse settings of wandb's in the working directory that send a run, and the API key with it, elsewhere.

    wandb reads ./wandb/settings above the user's own ~/.config/wandb/settings, and such a folder may come from anybody.

    Raises:
        UserError: naming the file and the setting.
    """
    import wandb

    settings = wandb.Settings()  # without the user's own file, which wandb.setup() adds
    default = wandb.Settings.model_fields["base_url"].default
    for key, value in settings.read_system_settings().all().items():
        same = key == "base_url" and value in (default, os.environ.get("WANDB_BASE_URL"))
        if not same and key not in HARMLESS:
            raise UserError(
                f"{settings.settings_workspace}: sets {key}; a file in the working directory may not say where a run "
                f"is sent: remove it there, and set it in the environment (WANDB_{key.upper()}) or in wandb's own "
                "~/.config/wandb/settings"
            )
