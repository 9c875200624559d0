"""A run's specification: every decision that follows from a checked configuration and the machine, with its reason.

Decided here and nowhere else. `plan`, `parallelism=auto`, the launcher, the trainer and the advice about a full memory
read it; another value of a field (`dataclasses.replace`) is another run. Loads neither torch nor Megatron.
"""

from dataclasses import dataclass

from posttrain.errors import UserError
from posttrain.models.config_checks import is_wide
from posttrain.ops.capped_limits import HIGHEST_CAP, WIDEST_HEAD
from posttrain.spec.decision import Decision, unless
from posttrain.spec.run_sizes import RunSizes
from posttrain.spec.stages import check_offloaded, check_recomputed

WRITTEN_OUT = "every score is kept, and a step is slower than planned"
BASE_CHECK_SECONDS = 5.0  # of a run of adapters, which may be short itself


@dataclass(frozen=True, kw_only=True)
class RunSpec(RunSizes):
    """One run, and what is done in it."""

    @property
    def one_shape(self) -> bool:
        """Whether all micro-batches need the same number of tokens, those of padding alone included."""
        alike = self.expert > 1 and bool(self.grouped_experts)  # on all processes that exchange tokens
        return alike or bool(self.cuda_graph) or (self.pipeline > 1 and not self.shapes_exchanged)

    @property
    def offload(self) -> Decision:
        """Whether activations can wait in the host's memory (posttrain.models.offloaded_activations).

        Transformer Engine's layers add a weight's gradient to Megatron's sum, which hooks of saved tensors can hide.
        """
        return unless(
            (self.device == "cpu", "they are in it anyway"),
            (self.pipeline > 1, "a pipeline has several micro-batches under way"),
            (self.fsdp, "Megatron-FSDP was not tried with it"),
            (self.shape is None, "the model's layers are not known here"),
            (not self.one_operation, "only plain LoRA as one operation with its layer was compared with it"),
            on="copied beside the products",
        )

    @property
    def offloaded_layers(self) -> int:
        """Layers whose activations wait in the host's memory."""
        if self.offload_layers is None or not self.offload:
            return 0
        return min(self.offload_layers, self.known_shape.layers)

    @property
    def one_operation(self) -> bool:
        """Whether a layer and its LoRA are one operation (posttrain.ops.fused_lora)."""
        return self._plain_lora and not (self.precision == "fp8" and not self.eight_bit_base)

    @property
    def _plain_lora(self) -> bool:
        plain = self.adapters is not None and self.adapters.kind == "LoRA" and not self.adapters.canonical
        return plain and self.fused and not self.dropout

    @property
    def grouped_experts(self) -> Decision:
        """Whether a mixture's experts are grouped products of static shapes (posttrain.models.mixture_layer).

        Under expert parallelism every process gathers all tokens of its group, as many from each. Tensor parallelism
        beside it divides a row's tokens, since a mixture has it with sequence parallelism only.

        Else they are upstream's, whose host asks the device how many tokens each expert gets.
        """
        adapted = self.adapters is not None and bool({"linear_fc1", "linear_fc2"} & set(self.adapters.sizes))
        return unless(
            (not self.experts, "the model has none"),
            (self.shape is None, "this family's are not known here"),
            (self.shape is not None and not self.shape.silu_gate, "their gate is not SiLU"),
            (not self.transformer_engine, "they require a GPU with Transformer Engine"),
            (self.mixture_settings, "trainer.megatron.model changes the mixture"),
            (self.expert > 1 and not self.packing, "data.packing=false, so processes have different numbers of tokens"),
            (not self.adapter, "all weights are trained"),
            (self.fsdp, "Megatron-FSDP divides the weights as one row of numbers"),
            (self.precision == "fp32", "grouped products exist in bf16 and 8 bits alone"),
            (self.precision == "fp8" and not self.every_layer_fused, "not every linear layer has a plain adapter"),
            (adapted and not self._plain_lora, "their adapters are not plain LoRA"),
            on="every token's choices are sorted on the device",
        )

    @property
    def expert_rows(self) -> int:
        """Rows of grouped experts that a process has memory for, for each of its own tokens.

        Expert parallelism's processes can get all choices of their group's tokens, of each at most one for an expert.
        """
        if not self.grouped_experts:
            return 0
        return self.expert * min(self.known_shape.chosen, self.experts // self.expert)

    @property
    def eight_bit_base(self) -> Decision:
        """Whether `precision=fp8` keeps the frozen weights in 8 bits instead of quantising them for every product.

        Needs layers that are computed with their adapter as one operation, all of them.
        """
        return unless(
            (self.precision != "fp8", f"precision is {self.precision}"),
            (not self.adapter, "all weights are trained"),
            (not self.every_layer_fused, "not every linear layer is one operation with its adapter"),
            (self.experts > 0 and not self.grouped_experts, f"experts: {self.grouped_experts.reason}"),
            on="frozen weights are quantised once",
        )

    @property
    def divided_before_read(self) -> bool:
        """Whether Megatron-FSDP divides an empty model into which the base is read, so that no process holds it whole.

        Any other is divided after its base is read, as Megatron-Bridge reads it before it attaches the adapters.
        """
        return self.fsdp and bool(self.eight_bit_base)

    @property
    def eight_bit_experts(self) -> bool:
        """Whether a mixture's experts are kept in 8 bits."""
        return self.experts > 0 and bool(self.eight_bit_base)

    def computed_again(self, linear: str) -> bool:
        """Whether what comes before a linear layer, its norm or activation, is not kept (ops/recomputed_norms.py)."""
        if not (self.one_operation and self.recompute_norms and self.transformer_engine) or not self.trains(linear):
            return False
        mixture = self.experts > 0 and linear in ("linear_fc1", "linear_fc2")
        if linear == "linear_proj" or mixture:
            return False
        return linear != "linear_fc2" or self.known_shape.activation_kernel

    @property
    def overlapped_exchanges(self) -> Decision:
        """Whether tensor parallelism's exchanges run beside products (posttrain.ops.division)."""
        return unless(
            (self.tensor == 1, "there are none"),
            (self.device == "cpu", "they are copies between GPUs"),
            (not self.overlap, "parallelism.overlap=false"),
            (not self.sequence_parallel, "parallelism.sequence_parallel=false"),
            (not self.one_operation, "not every layer is one operation with a plain LoRA"),
            on="where the GPUs read each other's memory",
        )

    @property
    def supervised_logits_only(self) -> Decision:
        """Whether the output layer sees supervised tokens alone."""
        return unless(
            (not self.skip_prompt_logits, "trainer.skip_prompt_logits=false"),
            (self.tensor > 1 and not self.adapter, "tensor parallelism divides an output layer that is trained"),
            (self.context > 1, "context parallelism divides the sequence"),
            on="prompts have no loss",
        )

    @property
    def bf16_adam(self) -> Decision:
        """Whether Adam's state can be in 16 bits (posttrain.train.bf16_adam)."""
        return unless(
            (not self.transformer_engine, "it requires a GPU with Transformer Engine"),
            (self.optimizer != "adam", "only Adam has such a state"),
            (self.adapter, "it is for all weights (peft=none), and an adapter's state is small anyway"),
            (self.precision != "bf16", "it requires bf16 weights, and keeps the bits that they lack of fp32 ones"),
            on="moments and the lower half of fp32 weights",
        )

    @property
    def heads_exchanged(self) -> Decision:
        """Whether context parallelism gives each process all tokens of some heads for attention (arXiv 2309.14509).

        Else keys and values go round (arXiv 2310.01889), which costs more, and a replayed step hung in it.
        """
        return unless(
            (self.context == 1, "there is none"),
            (self.shape is None, "the model's heads are not known here"),
            (self.kv_heads % self.context > 0, f"{self.kv_heads} key heads can't be divided by {self.context}"),
            on="attention sees all tokens of some heads",
        )

    @property
    def usual_attention(self) -> Decision:
        """Whether packed rows' attention is Transformer Engine's; see posttrain.models.local_spec.choose_attention."""
        shape = self.known_shape
        width = shape.head_width
        return unless(
            (shape.score_softcap is not None, "scores are soft-capped: kernels of their own"),
            (is_wide(width), f"its gradients are wrong for heads of {width} features: FlashAttention, if packed"),
            on="as for most models",
        )

    @property
    def capped_kernels(self) -> Decision:
        """Whether soft-capped attention keeps no scores (posttrain.ops.capped_attention); else it is written out."""
        shape = self.known_shape
        cap = shape.score_softcap
        return unless(
            (cap is None, "no score is soft-capped"),
            (self.device == "cpu", "they require a GPU"),
            (cap is not None and cap > HIGHEST_CAP, f"the cap is above {HIGHEST_CAP:g}: {WRITTEN_OUT}"),
            (shape.head_width > WIDEST_HEAD, f"heads have more than {WIDEST_HEAD} features: {WRITTEN_OUT}"),
            (shape.score_dropout > 0, f"attention has dropout: {WRITTEN_OUT}"),
            on="no score is kept",
        )

    @property
    def sample_answers(self) -> Decision:
        """Whether the live model answers validation prompts (posttrain.train.samples)."""
        return unless(
            (not self.answers, "trainer.num_generations=0, or no validation set"),
            (self.pipeline > 1, "no process has all layers"),
            (self.context > 1, "no process has whole sequences"),
            on="one process has all layers and whole sequences",
        )

    @property
    def cuda_graph(self) -> Decision:
        """Whether the forward and backward passes of a step are captured once and replayed.

        Small models spend most of a step on launching kernels otherwise. Needs micro-batches of one shape and a step
        that never asks the device for a number.
        """
        return unless(
            (self.graph is False, "trainer.cuda_graph=false"),
            *self._no_capture,
            (self.graph is None and self.no_cuda_graph is not None, str(self.no_cuda_graph)),
            on="the step is captured once and replayed",
        )

    @property
    def _no_capture(self) -> tuple[tuple[bool, str], ...]:
        return (
            (not self.transformer_engine, "it requires a GPU with Transformer Engine"),
            (not self.packing, "data.packing=false, so micro-batches have different shapes"),
            (self.shapes_exchanged, "stages exchange the shapes of micro-batches of more than one row"),
            (self.fsdp, "Megatron-FSDP gathers and frees each layer's weights as it comes to it"),
            (
                self.experts > 0 and not self.grouped_experts,
                f"the host asks how many tokens each expert gets: {self.grouped_experts.reason}",
            ),
            (self.context > 1 and not self.heads_exchanged, f"context parallelism: {self.heads_exchanged.reason}"),
            (self.precision == "fp32", "attention in fp32 asks the device for the rows' lengths"),
        )

    @property
    def base_check(self) -> Decision:
        """Whether the loaded model is compared with transformers on its files before the first step.

        A run of all weights lasts so much longer that it is always worth it.
        """
        by_itself = self.verify_base is None
        seconds = self._base_check_seconds
        return unless(
            (self.verify_base is False, "trainer.verify_base=false"),
            (by_itself and not self.export, "nothing is exported"),
            (by_itself and not self.verify, "trainer.verify=false"),
            (by_itself and self.adapter and seconds > BASE_CHECK_SECONDS, f"it would take about {seconds:.0f} s"),
            on="the loaded model is compared with its files",
        )

    @property
    def _base_check_seconds(self) -> float:
        """A rough time of loading a second copy of the model and computing a few prompts with both."""
        if self.shape is None:
            return 0.0
        if self.device == "cpu":
            return self.shape.parameters / 5e7
        return self.shape.parameters / 7e8

    def check(self) -> None:
        """Refuse what was asked for and can't be done.

        Raises:
            UserError: `optimizer=adam_bf16` where the state can't be in 16 bits, `trainer.cuda_graph=true` where a step
                can't be captured, `trainer.offload_layers` on a GPU where activations can't be offloaded, an adapter
                with `precision=fp8` under Megatron-FSDP where the frozen weights aren't kept in 8 bits; see also
                `check_layers`.
        """
        if self.fsdp and self.adapter and self.precision == "fp8" and not self.eight_bit_base:
            raise UserError(
                "`precision=fp8 parallelism=fsdp`: Megatron-FSDP can't divide Transformer Engine's frozen weights in 8 "
                f"bits, and this project's are off: {self.eight_bit_base.reason}; use precision=bf16, parallelism=ddp, "
                "or plain LoRA of all linear layers of a dense model (peft=lora peft.target_modules=all-linear)"
            )
        if self.bf16_state and not self.bf16_adam:
            raise UserError(
                f"`optimizer.use_precision_aware_optimizer=true`, as in optimizer=adam_bf16: {self.bf16_adam.reason}; "
                "use optimizer=adam"
            )
        if self.offload_layers and self.device == "cuda" and not self.offload:
            raise UserError(
                f"`trainer.offload_layers={self.offload_layers}`: activations can't wait in the host's memory: "
                f"{self.offload.reason}; remove it, or use trainer.recompute=full"
            )
        if self.shape is not None:
            self.check_layers(self.shape.layers)
        if self.graph and not self.cuda_graph:
            raise UserError(f"`trainer.cuda_graph=true`: a step can't be captured: {self.cuda_graph.reason}")

    def check_layers(self, layers: int) -> None:
        """Refuse more layers to compute again, or to have wait in the host's memory, than a model with `layers` has.

        Of stages that `trainer.megatron` divides, see posttrain.spec.stages.check_stages.

        Raises:
            UserError: it has fewer.
        """
        stages = self.stages_of(layers) or (layers,)
        check_recomputed(self.recompute_layers, layers, stages)
        check_offloaded(self.offload_layers, layers)

    def decisions(self) -> dict[str, Decision]:
        """What a user may want to know the reason of, by name; on a GPU."""
        decisions = {"CUDA graph": self.cuda_graph, "base check": self.base_check}
        if self.offload_layers:
            decisions["activations in the host's memory"] = self.offload
        if self.experts:
            decisions["experts as grouped products"] = self.grouped_experts
        if self.precision == "fp8":
            decisions["8-bit frozen weights"] = self.eight_bit_base
        if self.tensor > 1:
            decisions["exchanges beside products"] = self.overlapped_exchanges
        if self.shape is not None and is_wide(self.shape.head_width):
            decisions["Transformer Engine's attention"] = self.usual_attention
        if self.shape is not None and self.shape.score_softcap is not None:
            decisions["kernels of soft-capped attention"] = self.capped_kernels
        if self.answers and not self.whole_in_one:
            decisions["sample answers"] = self.sample_answers
        if self.skip_prompt_logits:
            decisions["logits of supervised tokens only"] = self.supervised_logits_only
        return decisions
