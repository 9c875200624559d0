"""What this project does around Megatron-Bridge's training loop: measure, validate, sample, export, sum up."""

import logging
import resource
import time
from typing import Any

import torch
from megatron.bridge.training.callbacks import Callback, CallbackContext
from megatron.bridge.training.state import GlobalState
from megatron.core.optimizer_param_scheduler import get_canonical_lr_for_logging
from megatron.core.utils import to_local_if_dtensor

from posttrain.checkpoint import directories, progress
from posttrain.checkpoint.manager import from_first_rank, load_weights
from posttrain.data.sealed import Used
from posttrain.errors import ExportRefused
from posttrain.models.fully_sharded import is_in_eight_bits, put_shards_back, wrappers_of
from posttrain.plan.report import planned_peak
from posttrain.train import early_stopping, learning_rates, pruning
from posttrain.train.batches import Counts
from posttrain.train.console import TRAINING
from posttrain.train.context import RunContext
from posttrain.train.counted_flops import count_flops
from posttrain.train.exporting import Exporter
from posttrain.train.loss_window import LossWindow
from posttrain.train.metrics import Metrics
from posttrain.train.nonfinite import NonFinitePolicy
from posttrain.train.profiler import Profile
from posttrain.train.rollback import RolledBack
from posttrain.train.run_batches import RunBatches, maximum_over_all
from posttrain.train.samples import Sampler
from posttrain.train.saves import SaveSchedule
from posttrain.train.validation import from_last_stage, gathered, validate
from posttrain.utils import rundir

log = logging.getLogger(__name__)

IN_CARD = ("val_loss_before", "train_loss", "supervised_tokens")  # of the totals, for the model card


class RunCallback(Callback):
    """One object for the whole run, since its parts share the step count and the summary.

    Args:
        run: the run.
        batches: its batches, and what is counted in them.
        exporter: of the trained weights.
        vocab_size: rows of the output layer, for the operations of a step.
        opened: the cached data that are being checked beside the start.

    Attributes:
        live: the model's chunks and the optimizer, once training begins.
        last_step: after which the run ends; an earlier one than asked for, once that is decided.
        stopped_early: why, if its own validation losses decided it; the same on every rank.
        pruned: why, if the other trials of a sweep did; the same on every rank.
    """

    def __init__(self, run: RunContext, batches: RunBatches, exporter: Exporter, vocab_size: int, opened: Used) -> None:
        self.run = run
        self.settings = run.settings
        self.progress = run.progress
        self.batches = batches
        self.exporter = exporter
        self.vocab_size = vocab_size
        self.opened = opened
        self.metrics = Metrics(run) if run.is_first else None
        self.sampler = Sampler(run.splits.validation, run.tokenizer, run.spec, run.settings)
        self.window = LossWindow(run.groups.objective.metrics, run.progress)
        self.nonfinite = NonFinitePolicy.from_run(run, batches)
        self.summary: dict[str, Any] = {"run_dir": str(run.run_dir), "steps": run.steps}
        self.live: tuple[list[torch.nn.Module], Any] = ([], None)
        self.saves = SaveSchedule(run.groups.checkpoint, run.world)
        self.last_step = run.steps
        self.stopped_early: str | None = None
        self.pruned: str | None = None
        self.planned: float | None = None
        self.profile: Profile | None = None
        self.frozen: list[float] | None = None
        self.first_step = 0
        self.lr: float | None = None
        self.began = 0.0

    def on_data_init_start(self, context: CallbackContext) -> None:
        """The checkpoint is loaded: the data continues from its place."""
        self.run.clock.mark("weights, optimizer")
        context.state.cfg.dataset.consumed_samples = context.state.train_state.consumed_train_samples

    def on_train_start(self, context: CallbackContext) -> None:
        """Validation loss and sample answers before the first step."""
        run = self.run
        self.first_step = context.state.train_state.step
        if self.first_step < run.steps:
            self.stop_early(context.state, self.first_step)
        self.live = (context.model, context.optimizer)
        run.clock.mark("data loader")
        self.check_data()
        if not run.spec.fsdp:
            sum_gradients_in_products(context.model)
        if self.metrics:
            self.announce(self.metrics, context)
        if self.first_step == 0:
            self.before_first_step(context)
        self.sampler.records = self.progress.samples
        if self.settings.profile and run.is_first:
            self.profile = Profile(run.run_dir, run.platform.device)
        if run.groups.peft:
            self.frozen = fingerprint_frozen(context.model)
        self.nonfinite.watch(context.optimizer)
        assert context.scheduler is not None
        learning_rates.follow(context.scheduler, run.schedule, self.settings.global_batch_size)
        save_on_sigterm(context.state)
        run.clock.mark("validation, samples")

    def announce(self, metrics: Metrics, context: CallbackContext) -> None:
        """Start the metrics and say what is trained."""
        run = self.run
        if run.on_gpu:
            self.planned = planned_peak(run.spec, run.config, run.splits.train)
        model_flops = count_flops(
            context.model,
            self.vocab_size,
            frozen=run.groups.peft is not None,
            gpus=run.world if run.on_gpu else 0,
        )
        metrics.start(self.first_step, self.last_step, model_flops, self.planned)

    def before_first_step(self, context: CallbackContext) -> None:
        """Compare the model with its files; validation loss and answers before training."""
        if self.run.spec.base_check:
            self.run.screen.phase("verifying")
            self.exporter.check_base(context.model)
            self.run.clock.mark("base check")
        self.progress.val_loss_before = self.validate(context, 0)
        self.sample(context, 0, "before")
        self.progress.samples = self.sampler.records

    def check_data(self) -> None:
        """Wait for the check of the cached data that began when it was opened; a collective call.

        Raises:
            RolledBack: on every process, where it isn't what was written; it is made again at the next start.
        """
        damaged = self.opened.remove_damaged()
        if maximum_over_all([float(damaged)], self.run.world)[0]:
            raise RolledBack("data: the cached rows have changed since they were written; they are made again")

    def on_train_step_start(self, context: CallbackContext) -> None:
        """Note the time and this step's learning rate (the scheduler moves on before the step ends)."""
        self.run.screen.phase(TRAINING)
        self.saves.begin_step()
        self.lr = get_canonical_lr_for_logging(context.optimizer.param_groups)
        self.progress.val_loss = None
        self.began = time.perf_counter()
        self.run.heartbeat.begin()

    def on_train_step_end(self, context: CallbackContext) -> None:
        """Numbers of the step; validation, answers and a save where they are due."""
        step = context.state.train_state.step + 1
        logged = step % self.settings.log_interval == 0 or step == self.run.steps
        values = self.reported(context) if logged else {}  # waits for the device
        if not context.skipped_iter:
            self.window.add(context.loss_dict)
        self.nonfinite.check(
            step,
            context.state.train_state.consumed_train_samples,
            context.skipped_iter,
            loss=values.get("loss"),
            gradient_norm=context.grad_norm,
        )
        elapsed = time.perf_counter() - self.began
        self.progress.seconds += elapsed
        self.batches.counter.step_seconds += elapsed
        if step == self.first_step + 1:
            self.after_first_step(context)
        validated = step == self.run.steps or is_due(step, self.settings.validation_interval)
        if logged or validated:
            self.batches.counter.collect()
        self.run.heartbeat.end()
        if logged:
            values |= self.window.take()
            self.log_step(step, values, context.grad_norm, self.batches.counter.take())
        if self.profile:
            self.profile.step()
        is_best = validated and self.judge(context, step)
        if step < self.last_step and is_due(step, self.settings.generation_interval):
            self.sample(context, step, None)
        self.plan_save(context.state, step, logged, is_best)

    def judge(self, context: CallbackContext, step: int) -> bool:
        """Validate after a step, and end the run there if the loss says so; a collective call.

        Returns:
            Whether it is the lowest loss so far.
        """
        loss = self.validate(context, step)
        self.progress.val_loss = loss
        if loss is None:
            return False
        self.progress.validations.append((step, loss))
        if step < self.run.steps:
            self.stop_early(context.state, step)
            if self.run.config.sweep.pruner and not self.stopped_early:
                self.prune(context.state, step, loss)
        return early_stopping.lowest(self.progress.validations) == (step, loss)

    def stop_early(self, state: GlobalState, step: int) -> None:
        """End the run after `step`, as if it were the last, if its validation losses say so."""
        settings = self.settings.early_stopping
        why = early_stopping.verdict(self.progress.validations, settings.patience, settings.min_delta)
        if why is not None:
            self.stopped_early = f"stopped early after step {step} of {self.run.steps}: {why}"
            self.last_step = step
            state.cfg.train.train_iters = step

    def plan_save(self, state: GlobalState, step: int, logged: bool, is_best: bool) -> None:
        """Have Megatron save after this step if that is due; after the last it does so anyway. A collective call."""
        is_regular = is_due(step, self.saves.interval)
        due = is_regular or (is_best and self.run.keeps_best) or (logged and self.saves.overdue())
        is_last = step == self.last_step
        self.progress.temporary = not is_regular and not is_last
        state.cfg.checkpoint.save_interval = step if due and not is_last else None

    def before_save(self) -> None:
        """Bring the progress, which a checkpoint keeps, up to date; a collective call."""
        self.run.screen.phase("saving")
        self.saves.begin()
        self.batches.counter.collect()
        self.window.collect()

    def reported(self, context: CallbackContext) -> dict[str, float]:
        """The objective's metrics of a step, by their columns in metrics.jsonl; the same on every rank."""
        values = {}
        for name, column in self.run.groups.objective.metrics.items():
            values[column] = from_last_stage(context.loss_dict.get(name))
        return values

    def after_first_step(self, context: CallbackContext) -> None:
        """How long the start took; whether adapters move."""
        self.run.clock.mark("first step")
        self.summary["startup_s"] = self.run.clock.seconds
        self.summary["time_to_first_step_s"] = round(self.run.clock.total, 2)
        if self.run.groups.peft and not context.skipped_iter:
            check_adapters(context.model)

    def log_step(self, step: int, values: dict[str, float], grad_norm: float | None, counts: Counts) -> None:
        """Record a logged step."""
        self.progress.train_loss = values["loss"]
        if self.metrics:
            epoch = self.batches.order.passes(step)
            self.metrics.step(step, values, self.lr, grad_norm, counts, epoch, peak_memory(self.run.on_gpu))

    def on_train_end(self, context: CallbackContext) -> None:
        """Answers after training, the export, the summary."""
        run = self.run
        step = self.last_step
        if step == self.first_step:  # the run had ended when it was started again
            self.progress.val_loss = self.validate(context, step)
        self.summary |= {"steps": step, "exported_step": step, "val_loss_after": self.progress.val_loss}
        if self.stopped_early:
            self.summary["stopped_early"] = self.stopped_early
        # By their representations, so that NaN equals NaN.
        if self.frozen is not None and repr(self.frozen) != repr(fingerprint_frozen(context.model)):
            raise RuntimeError("the frozen base weights changed during training")
        refused = None
        try:
            if run.exports_best:
                self.load_best(context.model, step)
            self.sample(context, step, "after")
            if self.settings.export:
                self.summary["export"] = str(self.exporter.export(context.model, self.results()))
        except ExportRefused as error:
            refused = error
            self.summary["export_refused"] = str(error)
        self.summary |= {
            **self.totals(),
            **self.memory(),
            "world_size": run.world,
            "rollbacks": len(self.progress.rollbacks),
            "data": run.splits.report,
        }
        if self.profile and self.profile.table:
            self.summary["profile"] = self.profile.table["milliseconds_per_step"]
        if self.metrics:
            rundir.write_json(run.run_dir, "summary.json", self.summary)
            samples = self.sampler.comparison
            if samples:
                rundir.write_json(run.run_dir, "samples.json", samples)
            self.metrics.finish(self.summary, samples)
        if refused:  # the run's numbers are kept
            raise refused

    def load_best(self, model: list[torch.nn.Module], step: int) -> None:
        """Give the model the weights of the lowest validation loss, after the last step; a collective call.

        Raises:
            ExportRefused: no whole checkpoint has such a loss.
        """
        root = self.run.run_dir / "checkpoints"
        best = from_first_rank(lambda: progress.best(root, hashes=True))
        if best is None:
            raise ExportRefused(f"trainer.export=best: no whole checkpoint in {root} has a validation loss")
        loss = from_first_rank(lambda: progress.validation_loss(best))
        best_step = directories.step_of(best)
        if best_step != step:
            self.run.screen.phase("loading the best weights")
            load_weights(model, self.exporter.model.peft, best)
        self.summary |= {"exported_step": best_step, "val_loss_after": loss}

    def validate(self, context: CallbackContext, step: int) -> float | None:
        """Loss of the validation split, None without one; a collective call."""
        if not self.run.validation_steps:
            return None
        self.run.screen.phase("validating")
        self.run.heartbeat.begin()
        values = validate(context, self.batches, self.run.groups.objective.metrics)
        self.run.heartbeat.end()
        if self.metrics:
            self.metrics.validation(step, values, self.batches.order.passes(step))
        return values["loss"]

    def sample(self, context: CallbackContext, step: int, when: str | None) -> None:
        """Answer the sample prompts for the trackers and, with trainer.generation_interval, for samples.jsonl."""
        with gathered(context):
            answers = self.sampler.run(context.model, when)
        if self.metrics and answers:
            self.metrics.samples(step, answers, in_file=self.settings.generation_interval is not None)

    def results(self) -> dict[str, Any]:
        """Numbers for the model card."""
        results = {name: self.summary[name] for name in ("steps", "exported_step", "val_loss_after")}
        totals = self.totals()
        for name in IN_CARD:
            results[name] = totals[name]
        return results

    def totals(self) -> dict[str, Any]:
        """Numbers of the whole run so far, for the summary."""
        done = self.progress
        return {
            "train_loss": done.train_loss,
            "val_loss_before": done.val_loss_before,
            "supervised_tokens": done.supervised_tokens,
            "tokens": done.tokens,
            "supervised_tokens_per_second": per_second(done.supervised_tokens, done.seconds),
            "tokens_per_second": per_second(done.tokens, done.seconds),
            "train_seconds": round(done.seconds, 2),
        }

    def prune(self, state: GlobalState, step: int, loss: float) -> None:
        """End the run after this step, saved, if other trials of the sweep do better; a collective call."""
        run = self.run
        self.pruned = from_first_rank(lambda: pruning.verdict(run.run_dir, run.config.sweep))
        if self.pruned is None:
            return
        if self.metrics:
            numbers = {"steps": step, "val_loss_after": loss}
            rundir.write_json(run.run_dir, "summary.json", self.summary | self.totals() | numbers)
        state.cfg.train.exit_interval = step  # Megatron saves and ends after a multiple of it

    def memory(self) -> dict[str, float]:
        """GiB of the process that has held most: on a GPU allocated, taken from the driver and planned; else resident.

        A collective call.
        """
        used = {"peak_memory_gib": peak_memory(self.run.on_gpu)}
        if self.run.on_gpu:
            used["reserved_memory_gib"] = torch.cuda.max_memory_reserved() / 2**30
        most = {}
        for name, value in zip(used, maximum_over_all(list(used.values()), self.run.world), strict=True):
            most[name] = round(value, 3)
        if self.planned is not None:
            most["memory_planned_gib"] = round(self.planned, 3)
        return most


def peak_memory(on_gpu: bool) -> float:
    """The most that this process has held so far, GiB: on a GPU allocated, else resident."""
    if on_gpu:
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def is_due(step: int, interval: int | None) -> bool:
    """Whether something that is done each `interval` steps is done after `step`; None: never."""
    return interval is not None and step % interval == 0


def per_second(count: float, seconds: float) -> float | None:
    """A rate, None where no time has passed."""
    return round(count / seconds, 1) if seconds else None


def check_adapters(model: list[torch.nn.Module]) -> None:
    """Every adapter's B must have moved off zero in the first step.

    Raises:
        RuntimeError: LoRA is silently not training.
    """
    put_shards_back(model)
    names = []
    moved = []
    for chunk in model:
        for name, parameter in chunk.named_parameters():
            # An expert may have got no token yet.
            if parameter.requires_grad and "linear_out" in name and ".local_experts." not in name:
                names.append(name)
                moved.append(torch.any(to_local_if_dtensor(parameter)))
    if not names:
        return
    flags = torch.stack(moved).int()
    if wrappers_of(model):  # of a small matrix a process may have nothing
        torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX)
    dead = [name for name, flag in zip(names, flags.tolist(), strict=True) if not flag]
    if dead:
        raise RuntimeError(f"{len(dead)} adapters did not move in the first step, among them {dead[0]}")


def fingerprint_frozen(model: list[torch.nn.Module]) -> list[float]:
    """Sums over each frozen tensor of this process, equal bit for bit while nothing changes."""
    put_shards_back(model)
    sums = []
    for chunk in model:
        for parameter in chunk.parameters():
            if parameter.requires_grad:
                continue
            values = to_local_if_dtensor(parameter.detach())
            if is_in_eight_bits(parameter):
                values = values.view(torch.uint8)
            if values.numel() >= 1_000_000:
                values = values.view(-1)[::997]
            sums.append(values.double().sum().item())
    return sums


def save_on_sigterm(state: GlobalState) -> None:
    """From now on SIGTERM saves after the step and ends the run.

    Before, it ends the process at once, even in a call that waits for other ranks and so runs no handler of Python's;
    there is nothing to save yet.
    """
    state.cfg.train.exit_signal_handler = True
    _ = state.signal_handler  # installed where it is first asked for


def sum_gradients_in_products(model: list[torch.nn.Module]) -> None:
    """Let products of weight gradients add to Megatron's sums over micro-batches, in Transformer Engine's layers.

    That is the part of core's `gradient_accumulation_fusion` which doesn't require Apex.
    """
    for part in model:
        for module in part.modules():
            if hasattr(module, "fuse_wgrad_accumulation"):
                module.fuse_wgrad_accumulation = True  # type: ignore[assignment]
