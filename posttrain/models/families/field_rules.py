"""What a field of config.json may say, for the families' records: values that are honoured, or that change nothing.

A field without a rule is refused unless it says nothing: ignoring it would build another model than the file describes.
Imports nothing heavy.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeGuard

from posttrain.utils.escape import escape_control, shorten

LONGEST = 200  # characters of a value in an error
NOTHING: tuple[object, ...] = (None, False, 0, 0.0, "", [], {})  # what says nothing, whatever the field means


@dataclass(frozen=True)
class Rule:
    """What one field may say.

    Attributes:
        words: the values, as the end of "must be ...".
        accepts: whether a value is one of them; null, which stands for transformers' default, isn't asked about.
        honoured: whether what is computed depends on the value.
    """

    words: str
    accepts: Callable[[object], bool]
    honoured: bool = True

    def problem(self, value: object) -> str | None:
        """What is wrong with a value, as the end of "field=value: ..."; None: nothing."""
        if value is None or self.accepts(value):
            return None
        return f"must be {self.words}"


def is_finite_number(value: object) -> TypeGuard[float]:
    """Whether a value of a JSON file is a number that a float can hold, NaN and infinity left out."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def above(limit: float) -> Rule:
    """Numbers above a limit."""
    words = "a positive number" if limit == 0 else f"a number above {limit:g}"
    return Rule(words, lambda value: is_finite_number(value) and value > limit)


def at_least(least: float) -> Rule:
    """Numbers from a least one on."""
    return Rule(f"a number from {least:g} on", lambda value: is_finite_number(value) and value >= least)


def only(*values: object) -> Rule:
    """No other values than these."""
    words = " or ".join(map(_spell, values))
    return Rule(words, lambda value: any(type(value) is type(known) and value == known for known in values))


def _spell(value: object) -> str:
    """A value as a config.json has it, text without quotes."""
    if isinstance(value, bool):
        return str(value).lower()
    return str(value)


def _is_count(value: object) -> bool:
    return type(value) is int and value > 0


def _is_fraction(value: object) -> bool:
    return is_finite_number(value) and 0 <= value < 1


def _is_share(value: object) -> bool:
    return is_finite_number(value) and 0 < value <= 1


def _are_layers(value: object) -> bool:
    return type(value) is int and value >= 0


def _are_positive(value: object) -> bool:
    return isinstance(value, list | tuple) and all(is_finite_number(item) and item > 0 for item in value)


def _are_layer_types(value: object) -> bool:
    return isinstance(value, list | tuple) and all(item in (FULL, SLIDING) for item in value)


FULL = "full_attention"
SLIDING = "sliding_attention"

COUNT = Rule("a positive whole number", _is_count)
POSITIVE = above(0)
FRACTION = Rule("a number from 0 on, below 1", _is_fraction)
SHARE = Rule("a number above 0, at most 1", _is_share)
WHOLE = only(1.0, 1)
LAYERS = Rule("a whole number from 0 on", _are_layers)
SWITCH = Rule("true or false", lambda value: isinstance(value, bool))
NO_EFFECT = Rule("anything", lambda value: True, honoured=False)
FACTORS = Rule("a list of positive numbers", _are_positive)
LAYER_TYPES = Rule(f"a list of {FULL} and {SLIDING}", _are_layer_types)
# Of the weights in the file, which are read whatever it says; transformers can't read a file with another name.
DTYPE = only("float32", "float16", "bfloat16", "float64")
# Those that Megatron's MLP can be given; see posttrain.models.bridges.activation_functions.
ACTIVATION = only(
    "silu",
    "swish",
    "gelu",
    "gelu_python",
    "gelu_new",
    "gelu_fast",
    "gelu_accurate",
    "gelu_pytorch_tanh",
    "gelu_python_tanh",
    "quick_gelu",
    "relu",
    "relu2",
    "sigmoid",
    "tanh",
)


def _one_line(value: object) -> str:
    """A name or value of a stranger's file, short and in one line."""
    return shorten(escape_control(str(value)).replace("\n", "\\n"), LONGEST)


def problem_in(fields: Mapping[str, object], rules: Mapping[str, Rule], prefix: str = "") -> str | None:
    """The first thing wrong with the fields of a file, as "field=value: ..."; None: nothing.

    Args:
        fields: of a config.json, or of a mapping in one.
        rules: by the fields' names; others may say nothing.
        prefix: in front of each name.
    """
    for name, value in fields.items():
        rule = rules.get(name)
        if rule is not None:
            problem = rule.problem(value)
        elif any(type(value) is type(nothing) and value == nothing for nothing in NOTHING):
            problem = None
        else:
            problem = "is not known, and ignoring it could build another model; take it out if nothing depends on it"
        if problem is not None:
            return f"{prefix}{_one_line(name)}={_one_line(value)}: {problem}"
    return None


_LENGTH = {"original_max_position_embeddings": COUNT}


@dataclass(frozen=True)
class RopeKind:
    """One kind of rotary embedding.

    Attributes:
        required, optional: its parameters.
        scales_attention: queries and keys are multiplied by a factor too.
    """

    required: Mapping[str, Rule] = field(default_factory=dict)
    optional: Mapping[str, Rule] = field(default_factory=dict)
    scales_attention: bool = False


ROPE_KINDS = {
    "default": RopeKind(optional={"factor": only(1.0, 1)}),
    "linear": RopeKind({"factor": at_least(1)}),
    "dynamic": RopeKind({"factor": at_least(1)}, _LENGTH),
    "llama3": RopeKind({"factor": at_least(1), "low_freq_factor": POSITIVE, "high_freq_factor": POSITIVE}, _LENGTH),
    "yarn": RopeKind(
        {"factor": at_least(1)},
        {
            **_LENGTH,
            "attention_factor": POSITIVE,
            "beta_fast": POSITIVE,
            "beta_slow": POSITIVE,
            "mscale": at_least(0),
            "mscale_all_dim": at_least(0),
            "truncate": SWITCH,
        },
        scales_attention=True,
    ),
    "longrope": RopeKind(
        {"short_factor": FACTORS, "long_factor": FACTORS},
        {**_LENGTH, "factor": at_least(1), "attention_factor": POSITIVE},
        scales_attention=True,
    ),
}


def rope_kind(parameters: Mapping[str, object]) -> object:
    """The kind that `rope_parameters` or `rope_scaling` of a config.json names, whatever that is."""
    return parameters.get("rope_type", parameters.get("type", "default"))


def rope_rule(*kinds: str, share: Rule) -> Rule:
    """The rule of `rope_parameters` and `rope_scaling`.

    Args:
        kinds: of rotary embedding that a family can have.
        share: the rule of the share of a head's features that it rotates.
    """
    words = f"a rotary embedding of the kind {' or '.join(kinds)}"
    return _RopeRule(words, lambda value: True, kinds=kinds, share=share)


@dataclass(frozen=True)
class _RopeRule(Rule):
    kinds: tuple[str, ...] = ()
    share: Rule = SHARE

    def problem(self, value: object) -> str | None:
        if value is None:
            return None
        if not isinstance(value, Mapping):
            return f"must be {self.words}"
        kind = rope_kind(value)
        if value.get("type", kind) not in (kind, None):
            return f"type={value['type']}, but rope_type={kind}; programs differ in which they read"
        if kind not in self.kinds:
            return f"the kind {kind!r} is not supported here; supported: {', '.join(self.kinds)}"
        known = ROPE_KINDS[str(kind)]
        missing = sorted(known.required.keys() - {name for name in value if value[name] is not None})
        if missing and value:
            return f"{missing[0]} is missing"
        usual = {
            "rope_type": NO_EFFECT,
            "type": NO_EFFECT,
            "rope_theta": above(1),
            "partial_rotary_factor": self.share,
        }
        return problem_in(value, {**usual, **known.required, **known.optional})


# Every config.json may hold these, and what a model computes depends on none.
_WITHOUT_EFFECT = """
    model_type architectures auto_map transformers_version _name_or_path name_or_path _commit_hash
    _attn_implementation _attn_implementation_autoset attn_implementation _experts_implementation use_cache return_dict
    output_hidden_states output_attentions torchscript use_bfloat16 tf_legacy_loss is_decoder tie_encoder_decoder
    cross_attention_hidden_size chunk_size_feed_forward id2label label2id num_labels problem_type finetuning_task
    task_specific_params tokenizer_class prefix bos_token_id eos_token_id pad_token_id sep_token_id
    decoder_start_token_id pretraining_tp unsloth_fixed unsloth_version use_return_dict
    gradient_checkpointing transformers.js_config
    max_length max_new_tokens min_length min_new_tokens do_sample early_stopping num_beams num_beam_groups
    diversity_penalty temperature top_k top_p min_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores return_dict_in_generate
    forced_bos_token_id forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens
    begin_suppress_tokens
"""
COMMON: Mapping[str, Rule] = {
    **dict.fromkeys(_WITHOUT_EFFECT.split(), NO_EFFECT),
    "vocab_size": COUNT,
    "tie_word_embeddings": SWITCH,
    "dtype": DTYPE,
    "torch_dtype": DTYPE,
    "initializer_range": at_least(0),
    "is_encoder_decoder": only(False),
    "add_cross_attention": only(False),
    "pruned_heads": only({}),
    "quantization_config": Rule("absent: give the model whose weights are not quantised", lambda value: False),
}
ALL_KINDS = tuple(ROPE_KINDS)


def decoder_rules(*, kinds: tuple[str, ...] = ALL_KINDS, **more: Rule) -> dict[str, Rule]:
    """Rules of a decoder in Llama's manner.

    Args:
        kinds: of rotary embedding that it can have.
        more: the rules of further fields, or others than here.
    """
    return {
        **COMMON,
        "hidden_size": COUNT,
        "intermediate_size": COUNT,
        "num_hidden_layers": COUNT,
        "num_attention_heads": COUNT,
        "num_key_value_heads": COUNT,
        "head_dim": COUNT,
        "hidden_act": ACTIVATION,
        "max_position_embeddings": COUNT,
        "rms_norm_eps": POSITIVE,
        "attention_dropout": FRACTION,
        "rope_theta": above(1),
        "rope_scaling": rope_rule(*kinds, share=WHOLE),
        "rope_parameters": rope_rule(*kinds, share=WHOLE),
        **more,
    }


type Constraint = Callable[[Mapping[str, object]], str | None]


def equal(name: str, other: str, default: object, reason: str) -> Constraint:
    """A constraint: two fields, of the same default, say the same."""

    def problem(config: Mapping[str, object]) -> str | None:
        value, expected = config.get(name, default), config.get(other, default)
        if value == expected:
            return None
        return f"{name}={value}: must be {other}={expected}; {reason}"

    return problem


def rope_parameters_of(config: Mapping[str, object]) -> dict[str, object]:
    """Parameters of a config.json's rotary embedding, in transformers' order: rope_scaling, then rope_parameters."""
    for name in ("rope_scaling", "rope_parameters"):
        value = config.get(name)
        if isinstance(value, Mapping) and value:
            return {str(key): item for key, item in value.items()}
    return {}


# Parameters of the rotary embedding that stand outside of rope_parameters too, and their names there.
_OUTSIDE = {
    "rope_theta": ("rope_theta", "rotary_emb_base"),
    "partial_rotary_factor": ("partial_rotary_factor", "rotary_pct"),
}


def padding_is_in_the_vocabulary(config: Mapping[str, object]) -> str | None:
    """transformers makes the embedding's row of pad_token_id zero, and can't load a model that has none."""
    token, rows = config.get("pad_token_id"), config.get("vocab_size")
    if isinstance(token, int) and isinstance(rows, int) and token >= rows:
        return f"pad_token_id={token}: is beyond vocab_size={rows}, which transformers can't load; set it to null"
    return None


def rope_is_said_once(config: Mapping[str, object]) -> str | None:
    """rope_theta, rope_scaling and rope_parameters, of which programs read one or the other, agree."""
    said: dict[str, object] = {}
    for key, names in _OUTSIDE.items():
        for name in names:
            item = config.get(name)
            before = said.setdefault(key, item)
            if before is None:
                said[key] = item
            elif item is not None and item != before:
                return f"{name}={item}: the file says {before} elsewhere; programs differ in which they read"
    for name in ("rope_scaling", "rope_parameters"):
        value = config.get(name)
        if not isinstance(value, Mapping) or not value:
            continue
        for key, item in {**value, "rope_type": rope_kind(value)}.items():
            before = said.setdefault(key, item)
            if before is None:
                said[key] = item
            elif item is not None and item != before:
                return f"{name}.{key}={item}: the file says {before} elsewhere; programs differ in which they read"
    return None


def rope_limit(config: Mapping[str, object]) -> int | None:
    """The longest sequence for which the frequencies of the rotary embedding don't depend on its length; None: any."""
    parameters = rope_parameters_of(config)
    limit = None
    if rope_kind(parameters) == "dynamic":
        limit = config.get("max_position_embeddings")
    if rope_kind(parameters) == "longrope" and parameters.get("short_factor") != parameters.get("long_factor"):
        limit = parameters.get("original_max_position_embeddings") or config.get("max_position_embeddings")
    return limit if isinstance(limit, int) else None


def spans_of(config: Mapping[str, object]) -> dict[str, int]:
    """Lengths, in tokens, beyond which a model of this config.json computes otherwise than up to them, by name."""
    spans = {}
    window, types = config.get("sliding_window"), config.get("layer_types")
    slides = config.get("use_sliding_window") is not False and (not isinstance(types, list) or SLIDING in types)
    if isinstance(window, int) and slides:
        spans["sliding window"] = window
    original = rope_parameters_of(config).get("original_max_position_embeddings")
    if isinstance(original, int):
        spans["original context"] = original
    return spans


def rope_limit_is_said(config: Mapping[str, object]) -> str | None:
    """Frequencies that depend on the length do so from a length on that the file has to say."""
    kind = rope_kind(rope_parameters_of(config))
    if kind in ("dynamic", "longrope") and config.get("max_position_embeddings") is None:
        return f"max_position_embeddings: is missing, and the rotary embedding {kind!r} is defined by it"
    return None


def windows_have_a_size(config: Mapping[str, object]) -> str | None:
    """Layers of sliding attention need sliding_window."""
    types = config.get("layer_types")
    if not isinstance(types, list | tuple) or SLIDING not in types:
        return None
    if config.get("sliding_window", 0) is None:
        return f"layer_types: has {SLIDING}, but sliding_window is null"
    return None


def windows_are_switched_on(config: Mapping[str, object]) -> str | None:
    """In families with use_sliding_window, which is false where it is absent, layers of sliding attention need it."""
    types = config.get("layer_types")
    if isinstance(types, list | tuple) and SLIDING in types and not config.get("use_sliding_window"):
        return f"layer_types: has {SLIDING}, but use_sliding_window is not true"
    return None


def types_for_each_layer(config: Mapping[str, object]) -> str | None:
    """layer_types has one entry for each layer."""
    types, layers = config.get("layer_types"), config.get("num_hidden_layers")
    if isinstance(types, list | tuple) and isinstance(layers, int) and len(types) != layers:
        return f"layer_types: has {len(types)} entries for {layers} layers"
    return None
