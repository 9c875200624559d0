"""List the ready runs of conf/experiment: `python -m posttrain.experiments [NAME]`.

Each is planned for the machine that its file names: memory and speed are `python -m posttrain.plan`'s. With a NAME the
file is shown. Loads neither torch nor Megatron.
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path

from posttrain.config.composition import CONF_DIR, compose
from posttrain.errors import UserError
from posttrain.plan.memory import GIB, estimate_memory
from posttrain.plan.speed import estimate_speed
from posttrain.spec.resolve import resolve_spec
from posttrain.utils import gpus, stop
from posttrain.utils.stop import fail
from posttrain.utils.suggest import nearest

DIRECTORY = CONF_DIR / "experiment"
HEADING = re.compile(r"# @package _global_\n# (?P<title>.+)\n(?:# Machine: (?:any|(?P<count>\d+) x (?P<gpu>.+))\n)?")
USAGE = "usage: python -m posttrain.experiments [NAME]"


@dataclass(frozen=True)
class Experiment:
    """A ready run.

    Attributes:
        name: what follows `experiment=`.
        title: one sentence.
        count: GPUs that it is meant for; 0: any machine does.
        gpu: which, as `plan.gpu` has it.
    """

    name: str
    title: str
    count: int
    gpu: str

    @property
    def machine(self) -> str:
        """The GPUs, in words."""
        if not self.count:
            return "any machine"
        return f"{self.count} x {self.gpu}"

    def plan(self) -> tuple[float, float]:
        """GiB that each GPU requires, and expected tok/s of all of them."""
        cfg = compose([f"experiment={self.name}"])
        spec = resolve_spec(cfg, self.count)
        speed = estimate_speed(spec, gpus.find_gpu(self.gpu), spec.global_batch * spec.length)
        assert speed.tokens_per_second is not None  # of known GPUs
        return estimate_memory(spec).needed / GIB, speed.tokens_per_second


def read_experiment(path: Path) -> Experiment:
    """What a file's first lines say; one of the user's own may say nothing."""
    heading = HEADING.match(path.read_text(encoding="utf-8"))
    if heading is None:
        return Experiment(path.stem, "(its file doesn't begin with a sentence about it)", 0, "")
    return Experiment(path.stem, heading["title"], int(heading["count"] or 0), heading["gpu"] or "")


def ready_runs() -> list[Experiment]:
    """All of them, by name."""
    return [read_experiment(path) for path in sorted(DIRECTORY.glob("*.yaml"))]


def show(name: str) -> None:
    """Print one file.

    Raises:
        UserError: there is no such experiment.
    """
    names = [path.stem for path in DIRECTORY.glob("*.yaml")]
    if name not in names:
        match = nearest(name, names)
        hint = f"; did you mean {match}?" if match else "; python -m posttrain.experiments lists them"
        raise UserError(f"{name}: no such experiment{hint}")
    print((DIRECTORY / f"{name}.yaml").read_text(encoding="utf-8").rstrip())


def list_all() -> None:
    """Print a line or two for each, as soon as it is planned."""
    print("python -m posttrain experiment=NAME data.path=FILE; memory per GPU and tok/s of all are planned\n")
    for experiment in ready_runs():
        line = f"{experiment.name:32} {experiment.machine:12}"
        if experiment.count:
            needed, speed = experiment.plan()
            line += f" {needed:6.1f} GiB {speed:8,.0f} tok/s"
        print(f"{line.rstrip()}\n    {experiment.title}", flush=True)


@stop.command
def main() -> None:
    """Entry point; exits with 2 after a user's mistake."""
    arguments = sys.argv[1:]
    if arguments[:1] in (["--help"], ["-h"]):
        print(f"{USAGE}\n\n{__doc__}")
        return
    try:
        if len(arguments) > 1:
            raise UserError(USAGE)
        if arguments:
            show(arguments[0])
        else:
            list_all()
    except UserError as error:
        fail(str(error))


if __name__ == "__main__":
    main()
