"""Run directories as runs leave them: the same files and keys, with numbers that follow from the settings."""

import json
import math
import random

import yaml
from omegaconf import OmegaConf

from posttrain.config.composition import compose
from posttrain.config.trial_names import trial_name

BEFORE = 3.6132
ERROR = "rank 0 failed: <b>the loss is NaN</b> at step 37\nlogs/rank0.log has more"
STEPS = 40
SECONDS_A_STEP = 2.5
TOKENS_A_STEP = 4800
START = 1_760_000_000.0


def make_run(path, overrides, config, loss, *, state="finished", error="", number=0, samples=(), gpus=1):
    """Write one run directory.

    Args:
        path: of the run.
        overrides: of its command line.
        config: the resolved configuration, nested.
        loss: its validation loss at the end.
        state: finished, failed, pruned or running; only a run that ended well has a summary.
        error: of status.json.
        number: of the run in its sweep, for the times.
        samples: of samples.json.
        gpus: 0: on the CPU.
    """
    (path / ".hydra").mkdir(parents=True)
    write(path / "config.yaml", yaml.dump(config, Dumper=yaml.CSafeDumper))
    write(path / ".hydra/overrides.yaml", yaml.dump(list(overrides), Dumper=yaml.CSafeDumper))
    started = START + 200.0 * number
    steps = STEPS if state == "finished" else 12
    points = curve_points(random.Random(number), loss, steps, started)
    write(path / "metrics.jsonl", "".join(json.dumps(point) + "\n" for point in points))
    status = {"state": state, "started": started}
    if state != "running":
        status["ended"] = started + 20 + SECONDS_A_STEP * steps
    if error:
        status["error"] = error
    write(path / "status.json", json.dumps(status))
    write(path / "spec.yaml", json.dumps(specification(gpus)))
    if state in ("finished", "pruned"):
        write(path / "summary.json", json.dumps(summary(path, loss, steps, gpus)))
    if state == "finished":
        (path / "adapter").mkdir()
        if samples:
            write(path / "samples.json", json.dumps(list(samples)))
    return path


def curve_points(noise, loss, steps, started):
    """The lines of metrics.jsonl: a validation every ten steps, a logged step in between."""
    points = [{"step": 0, "time": started + 20, "val_loss": BEFORE, "epoch": 0.0, "tokens": 0}]
    for step in range(1, steps + 1):
        share = math.exp(-5 * step / STEPS)
        time = started + 20 + SECONDS_A_STEP * step
        value = loss + (BEFORE - loss) * share
        axes = {"epoch": step / 94, "tokens": TOKENS_A_STEP * step}
        speed = 1900 + 60 * noise.random()
        points.append(
            {
                "step": step,
                "time": time,
                "loss": value * (1 + 0.06 * (noise.random() - 0.5)),
                "lr": 1e-4 * (1 + math.cos(math.pi * step / STEPS)),
                "grad_norm": 0.4 + share + 0.2 * noise.random(),
                "tokens_per_second": speed,
                "supervised_tokens_per_second": speed / 2,
                "padding": 0.1,
                "data_wait": 0.0005,
                **axes,
                "step_seconds": SECONDS_A_STEP,
                "memory_gib": 9.75,
                "batch": "c575ed0c",
            }
        )
        if step % 10 == 0:
            points.append({"step": step, "time": time + 0.5, "val_loss": value if step < steps else loss, **axes})
    return points


def specification(gpus):
    """What a report reads of spec.yaml."""
    return {
        "device": "cuda" if gpus else "cpu",
        "precision": "bf16" if gpus else "fp32",
        "model": {"family": "llama", "parameters": 134_515_008},
        "trained": {"kind": "LoRA", "rank": 16, "parameters": 4_055_040},
        "processes": {"world": gpus or 1},
    }


def summary(path, loss, steps, gpus):
    """summary.json of a run that ended."""
    rows = {"rows": 2400, "read": 2400, "kept": 2396, "truncated": 3, "dropped": {"too long": 4}, "unread": {}}
    train = {
        "conversations": 2380,
        "tokens": 170_209,
        "supervised_tokens": 78_296,
        "supervised_share": 0.46,
        "bins": 753,
    }
    memory = {"peak_memory_gib": 9.75, "memory_planned_gib": 9.6} if gpus else {"peak_memory_gib": 2.125}
    return {
        "run_dir": str(path),
        "steps": steps,
        "exported_step": steps,
        "startup_s": {"compose, launch": 1.51, "import": 9.12, "data": 2.17, "first step": 3.1},
        "val_loss_before": BEFORE,
        "val_loss_after": loss,
        "train_loss": loss * 1.05,
        "export": str(path / "adapter"),
        "tokens": TOKENS_A_STEP * steps,
        "supervised_tokens": TOKENS_A_STEP * steps // 2,
        "tokens_per_second": 1920.0 + steps,
        "supervised_tokens_per_second": 960.0,
        "train_seconds": SECONDS_A_STEP * steps,
        **memory,
        "world_size": gpus or 1,
        "data": {"unit": "conversation", "rows": rows, "train": train, "validation": {**train, "conversations": 16}},
    }


def make_search(root, trials, keys=("optimizer.lr", "peft.rank", "trainer.global_batch_size", "seed"), samples=()):
    """A search over four keys: the learning rate matters most, the rank a little; some trials fail or are pruned."""
    fixed = ["trainer.max_steps=40", "trainer.validation_interval=10"]
    config = OmegaConf.to_container(compose(fixed), resolve=True)
    choose = random.Random(0)
    for number in range(trials):
        values = (
            float(f"{10 ** choose.uniform(-5, -3):.3g}"),
            choose.choice([4, 8, 16, 32]),
            choose.choice([4, 8, 16]),
            choose.choice([1, 2, 3]),
        )
        lr, rank, batch, _ = values
        loss = 0.3 + (math.log10(lr) + 3.7) ** 2 / 3 + 0.8 / rank + 0.01 * batch + 0.02 * choose.random()
        state, error = "finished", ""
        if lr > 8e-4 or number == trials - 2:
            state, error = "failed", ERROR
        elif loss > 1.0:
            state, error = "pruned", "after step 12: validation loss 1.2 is worse than the median of 7 trials, 0.83"
        elif number == trials - 1:
            state = "running"
        swept = [f"{key}={value}" for key, value in zip(keys, values, strict=True)]
        for key, value in zip(keys, values, strict=True):
            *groups, last = key.split(".")
            node = config
            for group in groups:
                node = node[group]
            node[last] = value
        path = root / trial_name(swept, sorted(keys))
        if path.exists():
            continue
        make_run(path, [*fixed, *swept], config, loss, state=state, error=error, number=number, samples=samples)
    return root


def write(path, text):
    path.write_text(text, encoding="utf-8")
