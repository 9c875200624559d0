"""One run, from top to bottom: data, Megatron's configuration, `megatron.bridge.training.finetune`, what is left.

There is no training loop here: Megatron-Bridge's own runs, on a CPU as on a cluster; what this project adds comes in
through its callbacks.
"""

import os
from pathlib import Path

import torch
from megatron.bridge.training.finetune import finetune
from omegaconf import DictConfig, OmegaConf

from posttrain.checkpoint.progress import Progress
from posttrain.config.schema import TrainerSchema
from posttrain.data.sealed import Used
from posttrain.errors import Pruned, UserError
from posttrain.patches import Platform
from posttrain.spec.resolve import resolve_spec
from posttrain.spec.run_spec import RunSpec
from posttrain.train import megatron_config, out_of_memory
from posttrain.train.callbacks import RunCallback
from posttrain.train.console import RankScreen
from posttrain.train.context import Groups, RunContext
from posttrain.train.exporting import Exporter
from posttrain.train.run_batches import RunBatches
from posttrain.train.startup_clock import StartupClock
from posttrain.utils import working
from posttrain.utils.cache import cache_root
from posttrain.utils.heartbeat import Heartbeat


class Trainer:
    """The config group `trainer`, holding the instantiated other groups.

    Args:
        groups: the other groups' objects.
        platform: device and whether Transformer Engine is there.
        run_dir: where everything is written.
        frozen: the frozen configuration.
        clock: of the run's start.
        settings: the keys of conf/trainer/default.yaml.
    """

    def __init__(
        self,
        *,
        groups: Groups,
        platform: Platform,
        run_dir: Path,
        frozen: DictConfig,
        clock: StartupClock,
        **settings: object,
    ) -> None:
        self.groups = groups
        self.platform = platform
        self.run_dir = run_dir
        self.config = frozen
        self.clock = clock
        self.screen = RankScreen()
        working.report_to(self.screen.phase)
        typed = OmegaConf.to_object(OmegaConf.merge(TrainerSchema, settings))
        assert isinstance(typed, TrainerSchema)
        self.settings = typed

    def fit(self) -> None:
        """Validate, train, validate, save, export.

        Raises:
            UserError: something that a person can fix.
            Pruned: a sweep does without the rest of this run, which is saved.
        """
        opened = Used(verify=os.environ.get("LOCAL_RANK", "0") == "0")  # its check ends before the first step
        run = self.prepare(opened)
        self.screen.phase("loading the model")
        model = megatron_config.build_model(run)
        batches = RunBatches(run)
        callback = RunCallback(run, batches, Exporter(run, model), model.vocab_size, opened)
        container = megatron_config.build_container(run, model, batches, callback.before_save)
        try:
            finetune(container, batches.forward_step, callbacks=[callback])
        except torch.OutOfMemoryError as error:
            raise UserError(out_of_memory.describe(run.spec, error, *callback.live)) from error
        except SystemExit:
            if callback.pruned:
                raise Pruned(callback.pruned) from None
            raise

    def prepare(self, opened: Used | None = None) -> RunContext:
        """Load the tokenizer, prepare the data, and take every decision that depends on them.

        Args:
            opened: is told which cached folders were opened, for the caller to check; None: they are checked here.

        Raises:
            UserError: the data, the template or the decisions are wrong.
        """
        self.screen.phase("reading data")
        groups = self.groups
        world = int(os.environ["WORLD_SIZE"])
        spec = self.resolve(world)
        tokenizer = groups.model.load_tokenizer()
        seq_length = self.settings.seq_length
        splits = groups.data.build(
            encoder=groups.objective.encoder(groups.data, groups.template, tokenizer, seq_length),
            seq_length=seq_length,
            seed=self.config.seed,
            cache_dir=cache_root(self.config.cache_dir),
            length_multiple=spec.conversation_multiple,
            used=opened,
        )
        if not len(splits.train):
            raise UserError("data: nothing is left to train on; see the counts in the log, or use preview")
        template = groups.objective.template(groups.template)
        if template is not None:
            tokenizer.chat_template = template.source(tokenizer)  # exported with the model
        self.clock.mark("data")
        return RunContext(
            config=self.config,
            settings=self.settings,
            groups=groups,
            spec=spec,
            platform=self.platform,
            run_dir=self.run_dir,
            rank=int(os.environ["RANK"]),
            world=world,
            tokenizer=tokenizer,
            splits=splits,
            progress=Progress(),
            heartbeat=Heartbeat(),
            screen=self.screen,
            clock=self.clock,
        )

    def resolve(self, world: int) -> RunSpec:
        """Every decision that follows from the configuration and the machine.

        Raises:
            UserError: what was asked for can't be done.
        """
        fields = self.groups.model.hf_config().to_dict()
        spec = resolve_spec(self.config, world, self.platform.transformer_engine, self.platform.device, fields)
        spec.check()
        return spec
