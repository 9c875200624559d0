"""Configurations from a stranger, given to the real commands: refused with exit code 2, and nothing of them runs.

The payload is a module that is installed, as far as Python can tell, and in no list of dangerous ones.
"""

import pickle
import sys

import pytest
import yaml

from posttrain import __main__ as run
from posttrain import preview
from posttrain.config import secrets
from posttrain.convert import __main__ as convert
from posttrain.errors import UserError
from posttrain.launch import launcher
from posttrain.utils import cache

FIRE = {"_target_": "payload.fire"}
GLOBAL = "# @package _global_\n"


def attempt(words, main=run.main):
    """The message that the command ends with; it must end with exit code 2 before it starts anything."""
    sys.argv[1:] = list(words)
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2


@pytest.fixture
def refused(canary, tmp_path, monkeypatch, capsys):
    """Run a command with an experiment file `evil` and other files; returns what it said."""
    monkeypatch.setattr(sys, "argv", ["posttrain"])
    monkeypatch.setenv("HF_TOKEN", "the-token-of-whom-it-is")
    monkeypatch.setattr(run.launcher, "launch", lambda *_: pytest.fail("the run was started"))
    monkeypatch.chdir(tmp_path)

    def command(words, experiment=None, files=(), main=run.main):
        monkeypatch.setenv("HYDRA_FULL_ERROR", "0")  # the command sets it
        site = tmp_path / "site"
        written = dict(files)
        if experiment is not None:
            text = experiment if isinstance(experiment, str) else yaml.safe_dump(experiment)
            written["experiment/evil.yaml"] = GLOBAL + text
            words = ["experiment=evil", *words]
        for name, content in written.items():
            (site / name).parent.mkdir(parents=True, exist_ok=True)
            (site / name).write_text(content)
        place = ["--config-dir", str(site)] if written else []
        run_dir = tmp_path / "run"
        words = [*words] if "--cfg" in words else [*words, f"hydra.run.dir={run_dir}", f"hydra.sweep.dir={run_dir}"]
        attempt([*place, *words], main)
        said = capsys.readouterr().err
        assert "Traceback" not in said
        assert not (run_dir / "config.yaml").exists()
        return said

    return command


TARGETS = {
    "peft": {"peft": FIRE},
    "model": {"model": FIRE},
    "trainer": {"trainer": FIRE},
    "optimizer": {"optimizer": FIRE},
    "checkpoint": {"checkpoint": FIRE},
    "format": {"data": {"format": FIRE}},
    "format's function": {"data": {"format": {"function": {**FIRE, "_partial_": True}}}},
    "a tracker": {"logger": {"mine": FIRE}},
    "a list in a tracker": {"logger": {"mine": {"tags": [[{"deep": FIRE}]]}}},
    "template's variables": {"template": {"variables": {"x": FIRE}}},
    "architecture": {"model": {"architecture": {"rope": FIRE}}},
    "trainer.megatron": {"trainer": {"megatron": {"model": {"transformer_layer_spec": FIRE}}}},
    "an interpolation": {"run": {"name": "payload.fire"}, "peft": {"_target_": "${run.name}"}},
    "an object made by a resolver": {"peft": {"target_modules": "${oc.create:{_target_:payload.fire}}"}},
    "a decoded object": {"peft": {"target_modules": "${oc.decode:'{_target_:payload.fire}'}"}},
    "an object referred to": {"logger": {"mine": "${data.format}"}, "data": {"format": FIRE}},
    "an attribute of an allowed module": {"peft": {"_target_": "posttrain.peft.adapters.fire"}},
    "the standard library": {"peft": {"_target_": "os.system", "_args_": ["touch $CANARY"]}},
}


@pytest.mark.parametrize("place", TARGETS)
def test_a_target(place, refused):
    said = refused([], TARGETS[place])
    refusals = ("not a target that a configuration may name", "unknown key", "is no tracker")
    assert any(refusal in said for refusal in refusals)


MEGATRON = {
    "a checkpoint with pickles": ("checkpoint", "pretrained_checkpoint", "elsewhere"),
    "a checkpoint to resume from": ("checkpoint", "load", "elsewhere"),
    "another manager of checkpoints": ("checkpoint", "custom_manager_class", "payload.fire"),
    "a folder to save in": ("checkpoint", "save", "elsewhere"),
    "a tokenizer": ("tokenizer", "tokenizer_model", "elsewhere"),
    "a data set": ("dataset", "path", "elsewhere"),
    "a folder for logs": ("logger", "tensorboard_dir", "elsewhere"),
    "a file for a profile": ("profiling", "memory_snapshot_path", "elsewhere"),
    "a function by name": ("model", "fp8_quantizer_factory", "payload.fire"),
    "a folder of the model's": ("model", "config_logger_dir", "elsewhere"),
    "a dump": ("dist", "flight_recorder_dump_path", "elsewhere"),
    "a private field": ("model", "_pg_collection", "1"),
}


@pytest.mark.parametrize("what", MEGATRON)
def test_a_field_of_megatrons_configuration(what, refused):
    section, key, value = MEGATRON[what]
    said = refused([], experiment={"trainer": {"megatron": {section: {key: value}}}})
    assert f"trainer.megatron.{section}" in said
    assert f"trainer.megatron.{section}" in refused([f"+trainer.megatron.{section}.{key}={value}"])


SLURM = "hydra_plugins.posttrain_launcher.SlurmLauncher"
HYDRA = {
    "a callback": {"callbacks": {"mine": FIRE}},
    "a launcher": {"launcher": {"_target_": "payload.Fire"}},
    "within a launcher": {"launcher": {"_target_": SLURM, "sbatch": FIRE}},
    "a sweeper": {"sweeper": {"_target_": "payload.Fire"}},
    "within a sweeper": {"sweeper": {"params": FIRE}},
    "a log handler": {"job_logging": {"handlers": {"x": {"()": "payload.fire"}}, "root": {"handlers": ["x"]}}},
    "a log formatter": {"hydra_logging": {"formatters": {"x": {"class": "payload.Fire"}}}},
    "a log file elsewhere": {"job_logging": {"handlers": {"x": {"class": "logging.FileHandler", "filename": "/x"}}}},
    "environment for the run": {"job": {"env_set": {"POSTTRAIN_ALLOW_TARGETS": "payload", "LD_PRELOAD": "/x.so"}}},
    "environment copied to jobs": {"job": {"env_copy": ["HF_TOKEN"]}},
    "files beside the run directory": {"output_subdir": "../../elsewhere"},
    "shell lines of a job": {"launcher": {"_target_": SLURM, "setup": ["id"]}},
}  # fmt: skip


@pytest.mark.parametrize(
    "words", [[], ["--multirun", "optimizer.lr=1e-3,1e-4"], ["--cfg", "job"]], ids=lambda w: str(*w[:1])
)
@pytest.mark.parametrize("what", HYDRA)
def test_hydra_itself(what, words, refused):
    changed = HYDRA[what]
    defaults = [{"override /hydra/launcher": "slurm"}] if "launcher" in changed and "_target_" in changed else []
    said = refused(words, {"defaults": [*defaults, "_self_"], "hydra": changed})
    assert "hydra." in said


@pytest.mark.parametrize(
    "words",
    [
        ["+hydra.callbacks.x._target_=payload.fire"],
        ["hydra.launcher._target_=payload.Fire"],
        ["hydra.sweeper._target_=payload.Fire", "--multirun"],
        ["+hydra.job_logging.handlers.x.class=payload.Fire"],
        ["+hydra.job.env_set.PYTHONSTARTUP=/x"],
        ["hydra.searchpath=[pkg://imported]"],
        [
            "hydra/sweeper=optuna",
            "hydra.sweeper.custom_search_space=payload.fire",
            "--multirun",
            "peft.rank=choice(1,2)",
        ],
        ["hydra/sweeper=optuna", "hydra.sweeper.sampler._target_=payload.fire", "--multirun", "peft.rank=choice(1,2)"],
        ["hydra/launcher=slurm", 'hydra.launcher.partition="a\\n#SBATCH --wrap=id"', "--multirun", "peft.rank=1,2"],
        ["peft._target_=payload.fire"],
        ["+data.format.function._target_=payload.fire"],
    ],
    ids=lambda words: words[-1][:40],
)
def test_words_of_a_pasted_command(words, refused):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper") if "hydra/sweeper=optuna" in words else None
    refused(words)


def test_a_launchers_own_file_may_run_commands_but_no_other(canary, tmp_path):
    """A file chosen on the command line as the launcher is taken at its word; an experiment can't add to it."""
    from posttrain.config.composition import compose
    from posttrain.errors import UserError

    (tmp_path / "hydra" / "launcher").mkdir(parents=True)
    (tmp_path / "hydra" / "launcher" / "mine.yaml").write_text("defaults: [slurm]\nsetup: [module load cuda]\n")
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "evil.yaml").write_text(GLOBAL + "hydra: {launcher: {setup: [id]}}\n")
    chosen = [f"hydra.searchpath=[file://{tmp_path}]", "hydra/launcher=mine"]
    assert compose(chosen, with_hydra=True).hydra.launcher.setup == ["module load cuda"]
    with pytest.raises(UserError, match=r"hydra\.launcher\.setup: .*from no file"):
        compose([*chosen, "experiment=evil"], with_hydra=True)


@pytest.mark.parametrize(
    "text",
    [
        "peft: {<<: &a {_target_: payload.fire}}\nlogger: {x: *a}\n",
        "x: &a {_target_: payload.fire}\nlogger: {one: *a, two: [*a]}\n",
        "peft: !!python/object/apply:payload.fire []\n",
        "peft: !!python/object/new:os.system [touch $CANARY]\n",
        "peft: &a\n  self: *a\n",
        "a: &a [1,1,1,1,1,1,1,1,1,1]\n"
        + "".join(f"{n}: &{n} [{','.join([f'*{m}'] * 10)}]\n" for m, n in zip("abcdefghi", "bcdefghij", strict=True)),
        "a: " + "[" * 5000 + "]" * 5000,
        "run: {name: '${run.name}'}\n",
        "logger: {a: {b: '${logger.a}'}}\n",
        "peft: [unclosed\n",
        "\x00\x01",
    ],
    ids=["merge key", "alias", "python object", "python call", "alias of itself", "a billion laughs", "deep",
         "recursion", "a tree within itself", "broken", "binary"],
)  # fmt: skip
def test_yaml(text, refused):
    refused([], text)


@pytest.mark.parametrize("main, words", [(preview.main, []), (convert.main, ["import"])], ids=["preview", "convert"])
@pytest.mark.parametrize(
    "changed", [{"model": FIRE}, {"hydra": {"callbacks": {"x": FIRE}}}], ids=["target", "callback"]
)
def test_other_commands(main, words, changed, refused):
    files = {"model/evil.yaml": GLOBAL + yaml.safe_dump(changed)}
    refused([*words, "model=evil", *(["convert.out=out"] if words else [])], files=files, main=main)


def test_a_pickled_run_is_not_run_again(refused, tmp_path):
    class Evil:
        def __reduce__(self):
            return exec, ("import payload; payload.fire()",)

    (tmp_path / "config.pickle").write_bytes(pickle.dumps(Evil()))
    assert "it unpickles" in refused([f"--experimental-rerun={tmp_path / 'config.pickle'}"])


def test_code_of_a_model_needs_more_than_a_configuration(refused, tmp_path):
    (tmp_path / "model").mkdir()
    evil = {"model": {"path": str(tmp_path / "model"), "trust_remote_code": True}}
    assert "POSTTRAIN_TRUST_REMOTE_CODE" in refused(["model=hf"], evil)


@pytest.mark.parametrize("name", ["HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "MY_PASSWORD", "GH_AUTH"])
def test_a_secret_of_the_environment_is_not_put_into_a_configuration(name, refused, monkeypatch):
    monkeypatch.setenv(name, "a-secret-of-some-length")
    said = refused([], {"run": {"name": "${oc.env:" + name + "}"}})
    assert name in said and "a-secret" not in said
    said = refused([], {"template": {"variables": {"x": ["this is a-secret-of-some-length"]}}})
    assert f"${name}" in said and "a-secret" not in said


@pytest.mark.parametrize(
    "value", ["hf_" + "a" * 34, "ghp_" + "B" * 36, "sk-" + "c" * 40, "AKIA" + "D" * 16, "https://me:pass@host/x"]
)
def test_what_looks_like_a_secret_is_not_either(value, refused):
    assert value not in refused([], {"run": {"name": value}})


@pytest.mark.parametrize("words", [[], ["--multirun", "optimizer.lr=1e-3,1e-4"]], ids=["run", "sweep"])
def test_a_secret_in_a_configuration_of_another_name_is_not_written_down(words, refused, tmp_path):
    """Hydra leaves .hydra/config.yaml in the run directory before it calls the command's function."""
    value = "hf_" + "a" * 34
    evil = yaml.safe_dump({"defaults": ["config", "_self_"], "run": {"name": value}})
    assert "holds a Hugging Face token" in refused(["--config-name", "evil", *words], files={"evil.yaml": evil})
    written = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert not [path for path in written if value in path.read_text()]


def test_a_lock_that_is_a_link_empties_no_file(tmp_path):
    (tmp_path / "precious").write_text("kept")
    for name in (".lock", ".made.lock"):
        (tmp_path / name).symlink_to(tmp_path / "precious")
    with pytest.raises(UserError, match=r"\.lock: is a link"):
        launcher.lock_run(tmp_path)
    cache.build_once(tmp_path / "made", lambda scratch: None)
    assert (tmp_path / "precious").read_text() == "kept" and (tmp_path / "made").is_dir()


def test_harmless_environment_variables_and_words(monkeypatch):
    from posttrain.config.composition import compose

    monkeypatch.setenv("SCRATCH", "/scratch/me")
    cfg = compose(["cache_dir=${oc.env:SCRATCH}", "run.name=${oc.env:NOT_SET,monkey}"])
    secrets.check(cfg)
    assert (cfg.cache_dir, cfg.run.name) == ("/scratch/me", "monkey")


def test_names_of_sweeps_and_trials_stay_in_their_folder():
    from posttrain.config.trial_names import sweep_name, trial_name

    for name in ("../../x", "/etc/x", "a/../../b", "..", ".", "", "\x00x", "a\nb"):
        made = sweep_name(name, [], None)
        assert "/" not in made and "\x00" not in made and made not in ("", ".", "..") and not made.startswith(".")
        made = trial_name([f"model.path='{name}'"] if "\x00" not in name else ["model.path=x"], ["model.path"])
        assert "/" not in made and made not in ("", ".", "..") and not made.startswith(".")
