"""Whole runs killed over and over, and compared with a run that was left alone.

    python scripts/kill_runs.py [--kills 100] [--seed 0] [--modes lora,full,ddp,zero1] [--out outputs/kill_runs]

Starts `python -m posttrain` on a tiny model, ends all its processes by SIGKILL at a drawn time, and gives the same
command again, until it finishes. Then weights, optimizer and random states of every checkpoint, the exported
safetensors and the numbers of each step must be those of the undisturbed run, to the bit. A run is killed one to four
times; the kills are spread evenly over what a run does: importing, data, loading, steps, saving, validating, exporting.

What has been done is a line of OUT/results.jsonl each, and is not done again: the same command continues, also with
more kills. About half a minute for each kill on two cores. Exit code 1 if a run differs.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "e2e"))  # its model, and its comparison
import tiny_model
from commands import environment
from states import same_state, saved

ROOT = Path(__file__).resolve().parents[1]
PHASES = ("importing", "data", "loading", "steps", "saving", "validating", "exporting")
STEPS = 8
VALIDATE = 2  # every so many steps
MODES = {
    "lora": ["peft.dropout=0.1"],
    "full": ["peft=none"],
    "ddp": ["peft.dropout=0.1", "parallelism=ddp", "parallelism.nproc_per_node=2"],
    "zero1": ["peft=none", "parallelism=zero1", "parallelism.nproc_per_node=2"],
}
NUMBERS = ("step", "batch", "lr", "loss", "grad_norm", "val_loss", "epoch")
LIMIT_S = 600.0  # for one command
POLL_S = 0.005


@dataclass
class Kill:
    """One kill.

    Attributes:
        wanted: the phase that was drawn.
        phase: the phase that the run was in.
        after_s: how long after the command's start.
    """

    wanted: str
    phase: str
    after_s: float


@dataclass
class Outcome:
    """A run that was killed and resumed until it finished; a line of results.jsonl."""

    seed: int
    number: int
    mode: str
    kills: list[Kill] = field(default_factory=list)
    error: str = ""  # how it differs from the undisturbed run


class Command:
    """The command of a run, started.

    Args:
        words: of the command line.
        run_dir: its run directory.
        cache: its cache directory.
    """

    def __init__(self, words: list[str], run_dir: Path, cache: Path) -> None:
        self.run_dir = run_dir
        self.log, self.metrics = run_dir / "logs" / "rank0.log", run_dir / "metrics.jsonl"
        self.log_before = self.log.stat().st_size if self.log.exists() else 0
        self.metrics_before = identity(self.metrics)
        self.console = open(run_dir.with_suffix(".console"), "ab")  # noqa: SIM115  (closed when it has ended)
        self.began = time.monotonic()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "posttrain", *words, f"hydra.run.dir={run_dir}"],
            env=environment(cache), cwd=run_dir.parent, stdin=subprocess.DEVNULL, stdout=self.console,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def phase(self) -> str:
        """What the run does now, as far as its files tell."""
        if identity(self.metrics) in (None, self.metrics_before):
            said = b""
            if self.log.exists():
                with open(self.log, "rb") as file:
                    file.seek(self.log_before)
                    said = file.read()
            if b"Configuration Summary" in said:
                return "loading"
            return "data" if b" posttrain INFO device " in said else "importing"
        if (self.run_dir / "checkpoints" / ".partial").exists():
            return "saving"
        last = last_record(self.metrics)
        step = last.get("step", 0)
        if "val_loss" in last:
            return "exporting" if step == STEPS else "steps"
        validates = step % VALIDATE == 0
        saved_it = (self.run_dir / "checkpoints" / f"iter_{step:07d}").exists()
        if step == STEPS:
            return "validating" if saved_it else "saving"
        if validates and not saved_it:
            return "validating"
        return "steps"

    def kill_in(self, phase: str, visit: int, share: float, seconds: float) -> Kill | None:
        """End every process in `phase`, or return None when the command has ended before.

        Args:
            phase: what to wait for.
            visit: the how-manieth time that the run gets there, from 0.
            share: of the phase, that is to have passed.
            seconds: how long the phase takes.
        """
        before = None
        while self.process.poll() is None:
            now = self.phase()
            if now == phase and before != phase:
                visit -= 1
            before = now
            if now == phase and visit < 0:
                time.sleep(share * seconds)
                if self.process.poll() is not None:
                    return None
                now = self.phase()
                after = time.monotonic() - self.began
                self.kill()
                return Kill(phase, now, round(after, 3))
            if time.monotonic() - self.began > LIMIT_S:
                self.kill()
                raise TimeoutError(f"{self.run_dir}: the command takes longer than {LIMIT_S:g} seconds")
            time.sleep(POLL_S)
        self.console.close()
        return None

    def kill(self) -> None:
        """SIGKILL to the command and all that it has started."""
        command = psutil.Process(self.process.pid)
        family = [command, *command.children(recursive=True)]
        for process in family:
            process.kill()
        self.process.wait()
        psutil.wait_procs(family, timeout=60)
        self.console.close()

    def timeline(self) -> dict[str, float]:
        """Wait for the end; returns how many seconds a visit to each phase takes on average."""
        spent, visits, before = Counter(), Counter(), None
        since = self.began
        while self.process.poll() is None:
            now, at = self.phase(), time.monotonic()
            if before is not None:
                spent[before] += at - since
            visits[now] += now != before
            before, since = now, at
            time.sleep(POLL_S)
        self.console.close()
        return {phase: spent[phase] / visits[phase] for phase in PHASES if visits[phase]}


def identity(path: Path) -> int | None:
    """Which file a path leads to; a run that resumes replaces its metrics.jsonl when it is about to train."""
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return None


def last_record(path: Path) -> dict:
    """The last whole line of a file of JSON lines."""
    for line in reversed(path.read_bytes().splitlines()):
        try:
            return json.loads(line)
        except ValueError:  # it is being written
            continue
    return {}


def difference(run_dir: Path, reference: Path, checkpoints: dict[int, dict]) -> str:
    """How a finished run differs from the undisturbed one, in words; nothing if it doesn't.

    Args:
        run_dir, reference: the two.
        checkpoints: step -> what the undisturbed run's checkpoint holds.
    """
    for key in NUMBERS:
        one, other = (
            [json.loads(line).get(key) for line in (directory / "metrics.jsonl").read_text().splitlines()]
            for directory in (run_dir, reference)
        )
        if one != other:
            return f"{key} in metrics.jsonl: {one} instead of {other}"
    for file in sorted(reference.rglob("*.safetensors")):
        name = file.relative_to(reference)
        if (run_dir / name).read_bytes() != file.read_bytes():
            return f"{name} differs"
    for step, state in checkpoints.items():
        try:
            same_state(saved(run_dir, step), state)
        except AssertionError as error:
            return f"checkpoint of step {step}: {error or 'differs'}"
    return ""


class Runs:
    """What is killed and compared.

    Args:
        out: for everything; results.jsonl in it stays, the rest may be removed.
        seed: of what is drawn.
    """

    def __init__(self, out: Path, seed: int) -> None:
        self.out, self.seed = out, seed
        out.mkdir(parents=True, exist_ok=True)
        self.results = out / "results.jsonl"
        self.tiny = out / "tiny"
        if not (self.tiny / "data.jsonl").exists():
            tiny_model.write(self.tiny)
        self.words = [
            "model=hf", f"model.path={self.tiny}", "data=messages", f"data.path={self.tiny / 'data.jsonl'}",
            "data.validation_fraction=0.1", "trainer.seq_length=128", "trainer.global_batch_size=4",
            f"trainer.max_steps={STEPS}", "trainer.num_generations=0", f"trainer.validation_interval={VALIDATE}",
            "optimizer.lr=1e-2", "scheduler=cosine", "checkpoint.save_interval=1",
        ]  # fmt: skip
        self.references: dict[str, tuple[Path, dict[int, dict], dict[str, float]]] = {}

    def done(self) -> list[Outcome]:
        """What results.jsonl tells."""
        lines = self.results.read_text().splitlines() if self.results.exists() else []
        found = [Outcome(**json.loads(line)) for line in lines]
        for outcome in found:
            outcome.kills = [Kill(**kill) for kill in outcome.kills]
        return found

    def reference(self, mode: str) -> tuple[Path, dict[int, dict], dict[str, float]]:
        """The undisturbed run of a mode: its directory, its checkpoints, and how long its phases take (seconds)."""
        if mode not in self.references:
            folder = self.out / f"{mode}-undisturbed"
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            command = Command([*self.words, *MODES[mode]], folder / "run", folder / "cache")
            seconds = command.timeline()
            if command.process.returncode:
                raise SystemExit(f"the undisturbed run of {mode} failed: {folder / 'run.console'}")
            run_dir = folder / "run"
            checkpoints = {step: saved(run_dir, step) for step in range(1, STEPS + 1)}
            self.references[mode] = run_dir, checkpoints, seconds
        return self.references[mode]

    def run(self, mode: str, number: int, wanted: list[str]) -> Outcome:
        """One run, killed in each of the phases `wanted` and then left to finish."""
        reference, checkpoints, seconds = self.reference(mode)
        draw = random.Random(f"{self.seed} {number}")
        outcome = Outcome(self.seed, number, mode)
        folder = self.out / f"{mode}-{number}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        words = [*self.words, *MODES[mode]]
        ended = None
        for phase in wanted:
            command = Command(words, folder / "run", folder / "cache")
            visit = draw.randrange(2) if phase in ("steps", "saving", "validating") else 0
            kill = command.kill_in(phase, visit, draw.random(), seconds.get(phase, 0.0))
            if kill is None:
                ended = command.process.returncode
                break
            outcome.kills.append(kill)
        if ended is None:
            command = Command(words, folder / "run", folder / "cache")
            command.process.wait(timeout=LIMIT_S)
            command.console.close()
            ended = command.process.returncode
        outcome.error = f"exit code {ended}" if ended else difference(folder / "run", reference, checkpoints)
        if not outcome.error:
            shutil.rmtree(folder)
        return outcome

    def until(self, kills: int, modes: list[str]) -> Iterator[Outcome]:
        """Kill and compare until there have been `kills` in all; each outcome is recorded before it is yielded."""
        done = self.done()
        while sum(len(outcome.kills) for outcome in done) < kills:
            number = len(done)
            draw = random.Random(f"{self.seed} phases {number}")
            left = kills - sum(len(outcome.kills) for outcome in done)
            hit = Counter(kill.phase for outcome in done for kill in outcome.kills)
            # Those hit least, at random where they are equal; in the order in which a run comes to them.
            order = sorted(PHASES, key=lambda phase: (hit[phase], draw.random()))
            wanted = sorted(order[: min(left, draw.randint(1, 4))], key=PHASES.index)
            by_mode = Counter(outcome.mode for outcome in done for _ in outcome.kills)
            mode = min(modes, key=lambda mode: by_mode[mode])
            outcome = self.run(mode, number, wanted)
            with open(self.results, "a") as file:
                file.write(json.dumps(asdict(outcome)) + "\n")
            done.append(outcome)
            yield outcome


def table(done: list[Outcome]) -> str:
    """Mode and phase -> how many kills, and how many of their runs were equal to the undisturbed one."""
    lines = ["| mode | phase | kills | equal |", "|---|---|---|---|"]
    for mode in MODES:
        for phase in PHASES:
            ends = [not outcome.error for outcome in done if outcome.mode == mode
                    for kill in outcome.kills if kill.phase == phase]  # fmt: skip
            if ends:
                lines.append(f"| {mode} | {phase} | {len(ends)} | {sum(ends)} |")
    ends = [not outcome.error for outcome in done for _ in outcome.kills]
    lines.append(f"| all | all | {len(ends)} | {sum(ends)} |")
    return "\n".join(lines)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100, help="in all, with those of results.jsonl (default 100)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--modes", default=",".join(MODES), help=f"default: {','.join(MODES)}")
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "kill_runs")
    given = parser.parse_args()
    modes = given.modes.split(",")
    if unknown := set(modes) - set(MODES):
        parser.error(f"--modes: {', '.join(sorted(unknown))}: choose from {', '.join(MODES)}")
    os.environ["PYTHONUNBUFFERED"] = "1"
    runs = Runs(given.out.resolve(), given.seed)
    for outcome in runs.until(given.kills, modes):
        phases = ", ".join(kill.phase for kill in outcome.kills) or "not killed"
        print(f"{outcome.number:4} {outcome.mode:6} {phases}: {outcome.error or 'equal'}", flush=True)
    done = runs.done()
    print(table(done))
    raise SystemExit(1 if any(outcome.error for outcome in done) else 0)


if __name__ == "__main__":
    main()
