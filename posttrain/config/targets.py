"""Which `_target_`s a configuration may name.

A configuration may come from a stranger, and Hydra would import and call whatever it names. So only what is listed
here is built. Code of the user's own is allowed through the environment variable POSTTRAIN_ALLOW_TARGETS (module
prefixes, comma separated), which no configuration file can set.
"""

import os
import re
import traceback
from collections.abc import Iterator
from typing import Any

from hydra._internal.utils import _locate
from omegaconf import DictConfig, ListConfig, OmegaConf

from posttrain.config import policy
from posttrain.errors import UserError

# Files of Python and Hydra that the traceback of an import goes through.
IMPORTING = re.compile(r"/hydra/_internal/|^<frozen importlib|/importlib/__init__\.py$")
ENVIRONMENT = "POSTTRAIN_ALLOW_TARGETS"

# Where a `_target_` may stand, by its key path, and what it may be there. Upstream names are classes directly in the
# named modules: `[A-Z]\w*` keeps module attributes such as `megatron.bridge.training.config.os` out of reach.
PLACES = (
    (r"model", r"posttrain\.models\.HFModel", "posttrain.models.HFModel"),
    (r"peft", r"posttrain\.peft\.[A-Z]\w*", "a class of posttrain.peft"),
    (r"objective", r"posttrain\.objectives\.[A-Z]\w*", "a class of posttrain.objectives"),
    (r"data", r"posttrain\.data\.[A-Z]\w*Data", "a class of posttrain.data"),
    (
        r"data\.(sources\[\d+\]\.)?format",
        r"posttrain\.data\.formats(\.\w+)?\.[A-Z]\w*",
        "a class of posttrain.data.formats",
    ),
    (r"template", r"posttrain\.data\.templates\.[A-Z]\w*", "a class of posttrain.data.templates"),
    (
        r"parallelism",
        r"posttrain\.train\.parallelism\.Parallelism",
        "posttrain.train.parallelism.Parallelism",
    ),
    (r"optimizer", r"megatron\.bridge\.training\.config\.OptimizerConfig", "Megatron-Bridge's OptimizerConfig"),
    (r"scheduler", r"megatron\.bridge\.training\.config\.SchedulerConfig", "Megatron-Bridge's SchedulerConfig"),
    (r"trainer", r"posttrain\.train\.trainer\.Trainer", "posttrain.train.trainer.Trainer"),
    (
        r"trainer\.megatron\..*",
        r"megatron\.bridge\.training\.(config|comm_overlap)\.[A-Z]\w*Config",
        "a class of Megatron-Bridge's configuration",
    ),
    (r"precision", r"posttrain\.train\.precision\.Precision", "posttrain.train.precision.Precision"),
    (r"checkpoint", r"posttrain\.checkpoint\.Checkpoint", "posttrain.checkpoint.Checkpoint"),
    (r"logger\.[^.]+", r"posttrain\.train\.trackers\.[A-Z]\w*", "a class of posttrain.train.trackers"),
    (r"metric", r"posttrain\.evaluate\.[A-Z]\w*", "a class of posttrain.evaluate"),
)

# What Hydra itself builds: `hydra.sweeper` and `hydra.launcher`.
IN_HYDRA = re.compile(
    r"hydra\._internal\.core_plugins\.basic_(launcher\.BasicLauncher|sweeper\.BasicSweeper)"
    r"|hydra_plugins\.hydra_optuna_sweeper\.optuna_sweeper\.OptunaSweeper"
    r"|optuna\.samplers\.[A-Z]\w*Sampler"
    r"|hydra_plugins\.posttrain_launcher\.(Local|Slurm)Launcher"
)

# What `trainer.megatron` may set: sections that say how to compute, and of those no field that names files or code
# (Megatron unpickles, imports or writes what such fields name).
SECTIONS = (
    "model",
    "train",
    "validation",
    "optimizer",
    "scheduler",
    "ddp",
    "dist",
    "rng",
    "rerun_state_machine",
    "mixed_precision",
    "comm_overlap",
)
NOT_SET = re.compile(r"_.*|(?!use_)\w*(_dir|_path|_factory|_func|_spec|_class|_cfg)|restore_modelopt_state")


def walk(node: object, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield (key path, target) for every `_target_` anywhere below `node`, lists included."""
    if isinstance(node, DictConfig):
        if OmegaConf.is_missing(node, "_target_") or node._is_none():
            return
        for key in node:
            if OmegaConf.is_missing(node, key):
                continue
            value = node[key]
            name = str(key)
            where = f"{path}.{name}" if path else name
            if key == "_target_" and value is not None:
                yield where, value
            else:
                yield from walk(value, where)
    elif isinstance(node, dict):  # of a resolver, which Hydra would build all the same
        for key, value in node.items():
            if key == "_target_":
                yield f"{path}.{key}", value
            else:
                yield from walk(value, f"{path}.{key}")
    elif isinstance(node, list | tuple) or (isinstance(node, ListConfig) and not node._is_none()):
        for index, value in enumerate(node):
            yield from walk(value, f"{path}[{index}]")


def allowed(path: str, target: str) -> bool:
    """Whether `target` may be built where the key path `path`, which ends with `._target_`, says so."""
    place = path.removesuffix("._target_")
    shipped = any(re.fullmatch(where, place) and re.fullmatch(what, target) for where, what, _ in PLACES)
    return shipped or allowed_by_user(target)


def listed(target: str) -> bool:
    """Whether `target` may be built in one place or another, whatever the environment variable allows."""
    return any(re.fullmatch(what, target) for _, what, _ in PLACES)


def allowed_by_user(target: str) -> bool:
    """Whether the environment variable allows `target` by its name; see `require_own` for what the name leads to."""
    return bool(_prefixes(target))


def require_own(node: DictConfig) -> None:
    """Refuse targets of the user's modules that are defined elsewhere, as `mine.torch.load` is; imports the modules.

    Args:
        node: what is about to be built.

    Raises:
        UserError: naming the target; or see `find`.
    """
    for path, target in walk(node, node._get_full_key(None)):
        if listed(target):
            continue
        if not is_own(target, path):
            raise UserError(
                f"{path}={target}: is not defined in a module that {ENVIRONMENT} names, but imported there; a "
                "configuration may name what is defined in them"
            )


def is_own(target: str, key: str) -> bool:
    """Whether the environment variable allows `target`, and it is defined in the allowed module or below it.

    Raises:
        UserError: see `find`.
    """
    prefixes = _prefixes(target)
    if not prefixes:
        return False  # before anything is imported
    found = find(target, key)
    if target in prefixes:
        return True
    module = str(getattr(found, "__module__", None))
    name = f"{module}.{getattr(found, '__qualname__', '')}"
    return any(_within(module, prefix) or _within(name, prefix) for prefix in prefixes)


def find(target: str, key: str) -> Any:
    """What `target` names, as Hydra finds it; calls nothing, but imports modules.

    Args:
        target: dotted path.
        key: that names it, for the error.

    Raises:
        UserError: there is no such thing, or a module fails when it is imported: with its own error and its place.
    """
    try:
        return _locate(target)
    except Exception as error:  # whatever a module raises, wrapped by Hydra
        cause = error.__cause__ or error
        raise UserError(f"`{key}={target}`: {_failure(cause, target)}") from cause


def _failure(error: BaseException, target: str) -> str:
    """Why `target` can't be found: where its module fails, or what isn't there."""
    said = f"{type(error).__name__}: {' '.join(str(error).split())}"
    if isinstance(error, SyntaxError):
        return f"{error.filename}, line {error.lineno}: {type(error).__name__}: {error.msg}"
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not IMPORTING.search(frame.filename)]
    if own:
        return f"{own[-1].filename}, line {own[-1].lineno}: {said}"
    if isinstance(error, ModuleNotFoundError) and error.name == target.partition(".")[0]:
        return f"there is no module {error.name}; put its folder on PYTHONPATH"
    return f"there is no such thing ({said})"


def _prefixes(target: str) -> list[str]:
    """The prefixes that the environment variable allows and `target` is within."""
    prefixes = []
    for item in os.environ.get(ENVIRONMENT, "").split(","):
        prefix = item.strip()
        if prefix and _within(target, prefix):
            prefixes.append(prefix)
    return prefixes


def _within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def allowed_in_hydra(target: str) -> bool:
    """Whether `target` may be built below `hydra`."""
    return bool(IN_HYDRA.fullmatch(target))


def check(cfg: DictConfig) -> None:
    """Refuse a configuration that names anything else, also by a field of `trainer.megatron`.

    Raises:
        UserError: naming the key, the target and how to allow code of one's own.
    """
    try:
        named = list(walk(cfg))
    except RecursionError:
        raise UserError("the configuration refers to itself without end (an interpolation like a: ${a})") from None
    for path, target in named:
        if not isinstance(target, str) or not allowed(path, target):
            raise UserError(
                f"{path}={target}: not a target that a configuration may name{_instead(path)}. Code of your own: put "
                f"it on PYTHONPATH and allow its module with the environment variable {ENVIRONMENT}=your_module."
            )
    for group in {re.split(r"[.\[]", path)[0] for path, _ in named}:
        values = cfg[group]
        if OmegaConf.is_config(values):
            values = OmegaConf.to_container(values, resolve=True)
        for where, text in policy.texts(values, group):
            if "${" in text:
                raise UserError(f"`{where}`: holds ${{...}} as text, which would be filled in where it is used")
    if not OmegaConf.is_missing(cfg, "trainer"):
        _check_megatron(OmegaConf.select(cfg, "trainer.megatron"))


def _check_megatron(sections: object) -> None:
    """Refuse what `trainer.megatron` may not set."""
    if not isinstance(sections, DictConfig):
        return
    for section, values in sections.items():
        name = str(section)
        if name not in SECTIONS:
            raise UserError(f"trainer.megatron.{name}: not a section that may be set; possible: {', '.join(SECTIONS)}")
        if not isinstance(values, DictConfig):
            raise UserError(f"trainer.megatron.{name}={values}: must hold keys; +trainer.megatron.{name}.KEY=VALUE")
        for key in map(str, values):
            if NOT_SET.fullmatch(key):
                raise UserError(f"trainer.megatron.{name}.{key}: names files or code, so it may not be set")


def _instead(path: str) -> str:
    """What may stand there; completes "may name"."""
    place = path.removesuffix("._target_")
    for where, _, words in PLACES:
        if re.fullmatch(where, place):
            return f" here, where {words} is expected"
    return ""
