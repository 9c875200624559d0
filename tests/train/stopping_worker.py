"""Runs that stop early, save by the clock and export the best, in one process: `stopping_worker.py DIR [--all]`.

Megatron's import takes longer than all of them. Leaves the runs in DIR, and DIR/results.json: the validation losses of
the exported weights by transformers (and PEFT), and Transformers' own counts over the losses of CASES.
"""

import json
import os
import random
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "POSTTRAIN_DEVICE": "cpu"}
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
sys.path.insert(0, str(Path(__file__).parents[1] / "e2e"))  # the tiny model

THRESHOLDS = (0.0, 0.1, 0.25)


def drawn(seed: int) -> list[float]:
    """Losses that fall and rise, with equal ones, NaN and infinities among them."""
    rng = random.Random(seed)
    return [rng.choice([rng.uniform(1, 2), 1.5, 1.25, 1.2, float("nan"), float("inf")]) for _ in range(12)]


CASES = [[2.0, 2.0, 2.0], [2.0, 1.9, 1.8, 1.7], [float("nan"), 2.0, 1.0], [2.0, 2.1, 1.99, 2.0, 1.5]]
CASES += map(drawn, range(20))


def transformers_counts(losses: list[float], threshold: float) -> list[int]:
    """The callback's count of stale evaluations after each, updated in the order of Trainer's own loop."""
    from transformers import EarlyStoppingCallback, Trainer, TrainerControl

    callback = EarlyStoppingCallback(early_stopping_patience=10**9, early_stopping_threshold=threshold)
    args = SimpleNamespace(greater_is_better=False, metric_for_best_model="loss", save_strategy="no")
    trainer = SimpleNamespace(args=args, state=SimpleNamespace(best_metric=None))
    counts = []
    for loss in losses:
        metrics = {"eval_loss": loss}
        callback.on_evaluate(args, trainer.state, TrainerControl(), metrics)
        Trainer._determine_best_metric(trainer, metrics, None)
        counts.append(callback.early_stopping_patience_counter)
    return counts


def overdue_at(times: list[int], **group: object) -> list[int]:
    """At which of these seconds the clock asks for a save; each that it asks for takes ten."""
    from posttrain.checkpoint import Checkpoint
    from posttrain.train import saves

    now = 0.0
    clock, saves.time = saves.time, SimpleNamespace(monotonic=lambda: now)
    try:
        schedule = saves.SaveSchedule(Checkpoint(**group), 1)
        asked = []
        for now in times:
            schedule.begin_step()
            if schedule.overdue():
                asked.append(now)
                schedule.begin()
                now += 10
                schedule.begin_step()
    finally:
        saves.time = clock
    return asked


def fit(tiny: Path, run_dir: Path, *words: str):
    """Train as a rank does; returns the run's validation rows."""
    from posttrain.config.composition import compose
    from posttrain.launch.launcher import prepare
    from posttrain.launch.nodes import reserve_port
    from posttrain.launch.worker import build

    port = reserve_port()
    os.environ["MASTER_PORT"] = str(port.getsockname()[1])
    cfg = compose([
        "model=hf", f"model.path={tiny}", "data=messages", f"data.path={tiny / 'data.jsonl'}",
        "data.validation_fraction=0.1", "trainer.seq_length=128", "trainer.global_batch_size=4",
        "trainer.num_generations=0", "optimizer.lr=1", "scheduler=constant", "trainer.validation_interval=1",
        "peft.target_modules=[q_proj,v_proj,down_proj]", f"cache_dir={tiny / 'cache'}", *words,
    ])  # fmt: skip
    prepare(cfg, run_dir)
    trainer = build(run_dir)
    trainer.fit()
    return trainer.prepare().splits.validation


def exported_loss(tiny: Path, run_dir: Path, rows) -> float:
    """Validation loss of a run's exported weights, one conversation at a time."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    whole = run_dir / "hf"
    model = AutoModelForCausalLM.from_pretrained(whole if whole.is_dir() else tiny, dtype=torch.float32)
    if not whole.is_dir():
        model = PeftModel.from_pretrained(model, run_dir / "adapter")
    total, count = 0.0, 0
    for row in rows:
        parts = []
        for key in ("input_ids", "labels", "loss_mask"):
            parts.append(torch.as_tensor(row[key]).long().split(row["seq_lens"].tolist()))
        for ids, labels, mask in zip(*parts, strict=True):
            with torch.no_grad():
                logits = model(ids[None]).logits[0]
            losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
            total += float((losses * mask).sum())
            count += int(mask.sum())
    return total / count


def main() -> None:
    directory = Path(sys.argv[1])
    import tiny_model
    import torch

    from posttrain import patches

    patches.apply(patches.Platform.detect("cpu"))
    torch.set_num_threads(1)
    tiny = tiny_model.write(directory / "tiny")
    # Saved by the step, by the clock (after every step) and at each lowest loss.
    saves = ("trainer.max_steps=9", "checkpoint.save_interval=3", "checkpoint.save_interval_minutes=1e-6")
    stop = (*saves, "trainer.early_stopping.patience=2", "trainer.export=best")
    patient = (*saves, "trainer.early_stopping.patience=8", "trainer.export=false")
    runs = {"stopped": stop, "resumed": patient}
    if "--all" in sys.argv:
        runs |= {"undisturbed": patient, "full": (*stop, "peft=none", "optimizer.lr=0.3")}
    losses = {}
    for name, words in runs.items():
        if name == "resumed":
            shutil.copytree(directory / "stopped", directory / name)
        else:
            (directory / name).mkdir()
        rows = fit(tiny, directory / name, *words)
        if "trainer.export=best" in words:
            losses[name] = exported_loss(tiny, directory / name, rows)
    counts = [[transformers_counts(case, threshold) for case in CASES] for threshold in THRESHOLDS]
    seconds = list(range(0, 1000, 5))
    overdue = {
        "minute": overdue_at(seconds, save_interval_minutes=1),
        "ten minutes": overdue_at(seconds, save_interval_minutes=10),
        "none": overdue_at(seconds, save_interval_minutes=None),
        "not resumable": overdue_at(seconds, save_interval_minutes=1, save_optimizer=False),
        "not saved": overdue_at(seconds, save_interval_minutes=1, save=False),
    }
    results = {"losses": losses, "counts": counts, "overdue": overdue}
    (directory / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
