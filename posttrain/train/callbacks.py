"""What this project does around Megatron-Bridge's training loop: measure, validate, sample, export, sum up."""

import logging
import os
import resource
import signal
import time
from typing import Any

import torch
from megatron.bridge.training.callbacks import Callback, CallbackContext
from megatron.bridge.training.state import GlobalState
from megatron.core.optimizer_param_scheduler import get_canonical_lr_for_logging

from posttrain.plan import flops
from posttrain.plan.report import planned_peak
from posttrain.train.metrics import Metrics
from posttrain.train.nonfinite import NonFinitePolicy
from posttrain.train.rollback import RolledBack
from posttrain.train.samples import Sampler
from posttrain.train.validation import from_last_stage, gathered, validate
from posttrain.utils import rundir

log = logging.getLogger(__name__)


class RunCallback(Callback):
    """One object for the whole run, since its parts share the step count and the summary.

    Args:
        trainer: the run's trainer.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.settings = trainer.settings
        self.metrics = Metrics(trainer) if trainer.rank == 0 else None
        self.sampler = Sampler(trainer)
        self.summary: dict[str, Any] = {"run_dir": str(trainer.run_dir), "steps": trainer.steps}
        self.progress = trainer.progress
        self.nonfinite = NonFinitePolicy(trainer)
        self.heartbeat = trainer.heartbeat
        self.elapsed, self.since_log = 0.0, [0.0] * 7
        trainer.collect = self.collect

    def on_data_init_start(self, context: CallbackContext) -> None:
        """The checkpoint is loaded: the data resumes from its place."""
        self.trainer.startup.mark("weights, optimizer")
        context.state.cfg.dataset.consumed_samples = context.state.train_state.consumed_train_samples

    def on_train_start(self, context: CallbackContext) -> None:
        """Validation loss and sample answers before the first step."""
        self.first_step = context.state.train_state.step
        self.trainer.live = (context.model, context.optimizer)
        self.trainer.startup.mark("data loader")
        self.check_data()
        trainer = self.trainer
        on_gpu = trainer.platform.device == "cuda"
        self.flops = flops.ModelFlops.from_model(
            context.model, trainer.vocab_size, frozen=trainer.peft is not None, gpus=trainer.world if on_gpu else 0
        )
        if self.trainer.spec.eight_bit_base:
            quantise_frozen(context.model)
        if self.metrics:
            self.planned = None
            if on_gpu:
                self.planned = planned_peak(trainer.spec, trainer.config, trainer.splits.train)
            self.metrics.start(self.first_step, self.flops, self.planned)
        if self.first_step == 0 and not self.trainer.peft and self.settings.export:
            self.check_base(context)
        if self.first_step == 0:
            self.progress.val_loss_before = self.validate(context, 0)
            self.sample(context, 0, "before")
            self.progress.samples = self.sampler.records
        self.sampler.records = self.progress.samples
        self.profile = None
        if self.settings.profile and self.metrics:
            from posttrain.train.profiler import Profile

            self.profile = Profile(self.trainer.run_dir, self.trainer.platform.device)
        self.frozen = self.fingerprint(context) if self.trainer.peft else None
        self.nonfinite.watch(context.optimizer)
        save_on_sigterm(context.state)
        self.trainer.startup.mark("validation, samples")

    def check_data(self) -> None:
        """Wait for the check of the cached data that began when it was opened; a collective call.

        Raises:
            RolledBack: on every process, where it isn't what was written; it is made again at the next start.
        """
        damaged = self.trainer.cached.remove_damaged()
        if self.reduce([float(damaged)], maximum=True)[0]:
            raise RolledBack("data: the cached rows have changed since they were written; they are made again")

    def check_base(self, context: CallbackContext) -> None:
        """See that the model is what transformers reads from the files given; costs seconds, not hours afterwards."""
        from posttrain.convert.export import check_base, source_of

        trainer = self.trainer
        on_gpu = trainer.platform.device == "cuda"
        with torch.random.fork_rng(devices=[torch.cuda.current_device()] if on_gpu else []):
            trainer.base_check = check_base(source_of(trainer, context.model))
        if on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        trainer.startup.mark("base check")

    def on_train_step_start(self, context: CallbackContext) -> None:
        """Note the time and this step's learning rate (the scheduler moves on before the step ends)."""
        self.lr = get_canonical_lr_for_logging(context.optimizer.param_groups)
        self.began = time.perf_counter()
        self.heartbeat.begin()

    def on_train_step_end(self, context: CallbackContext) -> None:
        """Numbers of the step, and validation where it is due."""
        step = context.state.train_state.step + 1
        logged = step % self.settings.log_interval == 0 or step == self.trainer.steps
        if logged:
            loss = from_last_stage(context.loss_dict.get("lm loss"))  # waits for the device
        self.nonfinite.check(
            step, context.state.train_state.consumed_train_samples, context.skipped_iter,
            loss=loss if logged else None, gradient_norm=context.grad_norm,
        )  # fmt: skip
        elapsed = time.perf_counter() - self.began
        self.progress.seconds += elapsed
        if step == self.first_step + 1:
            self.trainer.startup.mark("first step")
            self.summary["startup_s"] = self.trainer.startup.seconds
            self.summary["time_to_first_step_s"] = round(sum(self.trainer.startup.seconds.values()), 2)
            if self.trainer.peft and not context.skipped_iter:
                self.check_adapters(context)
        self.elapsed += elapsed
        if logged:
            self.collect()
        self.heartbeat.end()
        if logged:
            self.progress.train_loss = loss
            if self.metrics:
                self.metrics.step(step, loss=loss, lr=self.lr, grad_norm=context.grad_norm, counts=self.since_log,
                                  seconds=self.progress.seconds, epoch=self.epoch(step))  # fmt: skip
            self.since_log = [0.0] * 7
        if self.profile:
            self.profile.step()
        interval = self.settings.validation_interval
        if interval and step % interval == 0 and step != self.trainer.steps:
            loss = self.validate(context, step)
            if self.metrics and loss is not None and self.trainer.config.sweep.pruner:
                self.prune(step, loss)
        every = self.settings.generation_interval
        if every and step % every == 0 and step != self.trainer.steps:
            self.sample(context, step, None)

    def collect(self) -> None:
        """Add up what this process has counted since the last call with what the others have; a collective call."""
        counts = self.reduce([*self.trainer.counted.take(), self.elapsed])
        self.elapsed = 0.0
        self.since_log = [a + b for a, b in zip(self.since_log, counts, strict=True)]
        self.progress.supervised_tokens += int(counts[0])
        self.progress.tokens += int(counts[1])

    def on_train_end(self, context: CallbackContext) -> None:
        """Validation loss and answers after training, the export, the summary."""
        trainer = self.trainer
        self.summary["val_loss_after"] = self.validate(context, trainer.steps)
        if self.frozen is not None and repr(self.frozen) != repr(self.fingerprint(context)):  # NaN is itself here
            raise RuntimeError("the frozen base weights changed during training")
        self.sample(context, trainer.steps, "after")
        refused = None
        if self.settings.export:
            from posttrain.convert.export import export_model
            from posttrain.convert.verify import ExportRefused

            try:
                results = {"steps": trainer.steps, "val_loss_after": self.summary["val_loss_after"]}
                wanted = ("val_loss_before", "train_loss", "supervised_tokens")
                results |= {key: value for key, value in self.totals().items() if key in wanted}
                self.summary["export"] = str(export_model(trainer, context.model, results))
            except ExportRefused as error:
                refused = error
                self.summary["export_refused"] = str(error)
        self.summary |= {
            **self.totals(),
            **self.memory(),
            "world_size": trainer.world,
            "rollbacks": len(trainer.progress.rollbacks),
            "data": trainer.splits.report,
        }
        if self.profile and self.profile.table:
            self.summary["profile"] = self.profile.table["milliseconds_per_step"]
        if self.metrics:
            rundir.write_json(trainer.run_dir, "summary.json", self.summary)
            if self.sampler.records:
                rundir.write_json(trainer.run_dir, "samples.json", self.sampler.records)
            self.metrics.finish(self.summary, self.sampler.records)
        if refused:  # the run's numbers are kept
            raise refused

    def validate(self, context: CallbackContext, step: int) -> float | None:
        """Loss per supervised token of the validation split, None without one."""
        if not self.trainer.validation_steps:
            return None
        self.heartbeat.begin()
        loss = validate(context)
        self.heartbeat.end()
        if self.metrics:
            self.metrics.validation(step, loss)
        return loss

    def sample(self, context: CallbackContext, step: int, when: str | None) -> None:
        """Answer the sample prompts; with trainer.generation_interval the answers are recorded at `step`."""
        with gathered(context):
            answers = self.sampler.run(context.model, when)
        if self.metrics and answers and self.settings.generation_interval:
            self.metrics.samples(step, answers)

    def totals(self) -> dict[str, Any]:
        """Numbers of the whole run so far, for the summary."""
        done = self.progress
        return {
            "train_loss": done.train_loss,
            "val_loss_before": done.val_loss_before,
            "supervised_tokens": done.supervised_tokens,
            "tokens": done.tokens,
            "supervised_tokens_per_second": round(done.supervised_tokens / done.seconds, 1) if done.seconds else None,
            "tokens_per_second": round(done.tokens / done.seconds, 1) if done.seconds else None,
            "train_seconds": round(done.seconds, 2),
        }

    def prune(self, step: int, loss: float) -> None:
        """End the run after this step, as SIGTERM would, if other trials of the sweep do better. First rank only."""
        from posttrain.train import pruning

        run_dir = self.trainer.run_dir
        if reason := pruning.verdict(run_dir, self.trainer.config.sweep):
            numbers = {"steps": step, "val_loss_after": loss}
            rundir.write_json(run_dir, "summary.json", self.summary | self.totals() | numbers)
            message = {"rank": 0, "time": time.time(), "user_error": False, "pruned": True, "message": reason}
            rundir.write_json(run_dir, "logs/rank0.error.json", message)
            os.kill(os.getpid(), signal.SIGTERM)  # every rank learns of it at the end of the step

    def epoch(self, step: int) -> float:
        """Passes over the training rows after `step`."""
        return step * self.settings.global_batch_size / len(self.trainer.splits.train)

    def check_adapters(self, context: CallbackContext) -> None:
        """Every adapter's B must have moved off zero in the first step.

        Raises:
            RuntimeError: LoRA is silently not training.
        """
        dead = [
            name
            for chunk in context.model
            for name, parameter in chunk.named_parameters()
            if parameter.requires_grad and "linear_out" in name and not torch.any(parameter)
        ]
        if dead:
            raise RuntimeError(f"{len(dead)} adapters did not move in the first step, among them {dead[0]}")

    def fingerprint(self, context: CallbackContext) -> list[float]:
        """Sums over each frozen tensor of this process, equal bit for bit while nothing changes."""
        return [
            parameter.detach().double().sum().item() if parameter.numel() < 1_000_000
            else parameter.detach().view(-1)[::997].double().sum().item()
            for chunk in context.model
            for parameter in chunk.parameters()
            if not parameter.requires_grad
        ]  # fmt: skip

    def reduce(self, values: list[float], maximum: bool = False) -> list[float]:
        """Sums (or maxima) over the processes that see different data."""
        if self.trainer.world == 1:
            return list(values)
        from megatron.core import parallel_state

        tensor = torch.tensor(values, dtype=torch.float64, device="cuda")
        group = None if maximum else parallel_state.get_data_parallel_group()
        operation = torch.distributed.ReduceOp.MAX if maximum else torch.distributed.ReduceOp.SUM
        torch.distributed.all_reduce(tensor, op=operation, group=group)
        return tensor.tolist()

    def memory(self) -> dict[str, float]:
        """GiB of the process that has held most: on a GPU allocated, taken from the driver and planned; else resident.

        A collective call.
        """
        if self.trainer.platform.device == "cpu":
            held = {"peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
        else:
            held = {"peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30,
                    "reserved_memory_gib": torch.cuda.max_memory_reserved() / 2**30}  # fmt: skip
        most = dict(zip(held, self.reduce(list(held.values()), maximum=True), strict=True))
        if self.metrics and self.planned is not None:
            most["memory_planned_gib"] = self.planned
        return {name: round(value, 3) for name, value in most.items()}


def save_on_sigterm(state: GlobalState) -> None:
    """From now on SIGTERM saves after the step and ends the run.

    Before, it ends the process at once, even in a call that waits for other ranks and so runs no handler of Python's;
    there is nothing to save yet.
    """
    state.cfg.train.exit_signal_handler = True
    _ = state.signal_handler  # installed where it is first asked for


def quantise_frozen(model: list[torch.nn.Module]) -> None:
    """Keep the frozen weights of layers with an adapter in 8 bits from now on."""
    from posttrain.ops.fused_lora import fused_layers

    layers = fused_layers(model)
    for layer in layers:
        layer.quantise()
    log.info("precision=fp8: the frozen weights of %d layers are kept in 8 bits", len(layers))
