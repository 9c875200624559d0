"""Experiment trackers, written to by the first rank. No tracker library at import."""

import os
import re
import secrets
import shlex
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from posttrain.errors import UserError
from posttrain.utils import rundir

WANDB_ID = "wandb.json"  # in a run directory
Mode = Literal["online", "offline", "disabled"]
MODES: tuple[Mode, ...] = get_args(Mode)
HARMLESS = ("project", "mode", "disabled")  # of wandb's settings: Wandb gives the first two itself


@dataclass(frozen=True)
class Resumed:
    """The part of a run before it was resumed.

    Attributes:
        step: that it is resumed after; what an earlier process has recorded later was lost with it.
        points: what was recorded at that step.
        samples: the answers at that step.
    """

    step: int
    points: Sequence[dict[str, float]]
    samples: list[dict[str, str]]


class Tracker:
    """Where numbers go besides metrics.jsonl.

    Attributes:
        notice: what the person at the keyboard should know, once it has started; empty: nothing.
    """

    notice = ""

    def check(self) -> None:
        """See before anything is loaded that the tracker can be written to.

        Raises:
            UserError: it can't.
        """

    def start(self, run_dir: Path, name: str, config: dict[str, Any], resumed: Resumed | None = None) -> None:
        """Begin the run `name` with its configuration, or continue it after `resumed`."""

    def log(self, step: int, values: dict[str, float]) -> None:
        """Record `values` at `step`."""

    def table(self, step: int, name: str, rows: list[dict[str, str]]) -> None:
        """Record texts at `step`: rows of the same keys."""

    def finish(self, summary: dict[str, Any]) -> str | None:
        """End the run; returns where its record is, in words, if a person should know."""


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
        raise UserError(f"WANDB_MODE={mode}: must be one of {', '.join(MODES)}")

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

    def start(self, run_dir: Path, name: str, config: dict[str, Any], resumed: Resumed | None = None) -> None:
        """Begin the run, or continue it under the id that it has in wandb, where later steps than it has are added.

        Raises:
            UserError: a file in the working directory says where it is sent.
        """
        import wandb

        refuse_workspace()
        host = str(wandb.setup().settings.base_url)
        if host != wandb.Settings.model_fields["base_url"].default and self.effective_mode == "online":
            self.notice = f"wandb: the run is sent to {host}"
        run_id = known_id(run_dir) if resumed else None
        if run_id is None:
            run_id = secrets.token_hex(4)
            rundir.write_json(run_dir, WANDB_ID, {"id": run_id})
        self.run = wandb.init(
            id=run_id,
            resume="allow",
            project=self.project or os.environ.get("WANDB_PROJECT") or "posttrain",
            entity=self.entity,
            mode=self.effective_mode,
            group=self.group,
            tags=None if self.tags is None else list(self.tags),
            name=name,
            dir=str(run_dir.absolute()),
            config=config,
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


def known_id(run_dir: Path) -> str | None:
    """The id that a run has in wandb, None where it has none yet."""
    run_id = rundir.object_if_any(run_dir, WANDB_ID).get("id")
    if isinstance(run_id, str) and re.fullmatch(r"[a-z0-9]{4,64}", run_id):
        return run_id
    return None


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


@dataclass
class TensorBoard(Tracker):
    """TensorBoard event files in RUN_DIR/tensorboard."""

    def start(self, run_dir: Path, name: str, config: dict[str, Any], resumed: Resumed | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Points from this step on are hidden, in whichever file they are; those that are not lost are written again.
        # A first start says so as well: TensorBoard takes the first that it reads for the beginning.
        self.writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=resumed.step if resumed else 0)
        if resumed:
            for point in resumed.points:
                self.log(resumed.step, point)
            self.table(resumed.step, "samples", resumed.samples)

    def log(self, step: int, values: dict[str, float]) -> None:
        for key, value in values.items():
            self.writer.add_scalar(key, value, step)

    def table(self, step: int, name: str, rows: list[dict[str, str]]) -> None:
        for index, row in enumerate(rows):  # markdown; an indented text is shown as it is
            text = "\n\n".join(f"**{key}**\n\n{textwrap.indent(value, '    ')}" for key, value in row.items())
            self.writer.add_text(f"{name}/{index}", text, step)

    def finish(self, summary: dict[str, Any]) -> str | None:
        self.writer.close()
        return None
