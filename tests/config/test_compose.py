"""From words to a configuration, and from a mistake to a message."""

import errno
import subprocess
import sys
import time

import pytest
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from posttrain.cli import command as cli_command
from posttrain.config.composition import CONF_DIR, compose, explain, key_paths
from posttrain.errors import UserError, location_error


def test_default_configuration_is_the_demo():
    cfg = compose()
    assert cfg.model.path == "demo:smollm2_135m"
    assert cfg.peft._target_ == "posttrain.peft.LoRA"
    assert cfg.trainer.seq_length == 256


def test_other_data_keep_the_trainer_defaults():
    cfg = compose(["model=llama3_8b", "data=alpaca", "data.path=x.json"])
    assert (cfg.trainer.seq_length, cfg.trainer.max_steps, cfg.optimizer.lr) == (4096, None, 2e-4)


def test_full_fine_tuning_has_its_own_learning_rate():
    assert compose(["model=llama3_8b", "peft=none"]).optimizer.lr == 1e-5


def test_tiny_models_take_larger_learning_rates():
    assert compose(["model=smollm2_135m"]).optimizer.lr == pytest.approx(1e-3)
    assert compose(["model=smollm2_135m", "peft=none"]).optimizer.lr == pytest.approx(5e-5)


def test_command_line_wins_over_every_group():
    assert compose(["peft=lora", "data=demo", "optimizer.lr=3e-5"]).optimizer.lr == 3e-5


def test_several_loggers():
    assert set(compose(["logger=[wandb,tensorboard]"]).logger) == {"wandb", "tensorboard"}
    assert set(compose(["logger=wandb"]).logger) == {"wandb"}
    assert not compose().logger


def test_a_range_without_a_search():
    override = OverridesParser.create().parse_overrides(["optimizer.lr=interval(1e-5,1e-3)"])
    with pytest.raises(HydraException) as refused:
        BasicSweeper.split_arguments(override, None)
    assert "add hydra/sweeper=optuna" in explain(refused.value, [])


def test_an_experiment_without_its_package(tmp_path):
    """Its keys land below the group's name; the message says the line that is missing."""
    folder = tmp_path / "experiment"
    folder.mkdir()
    (folder / "mine.yaml").write_text("trainer:\n  max_steps: 1\n")
    with pytest.raises(UserError, match=r"`experiment`: unknown key.*experiment/mine.yaml.*# @package _global_"):
        compose([f"hydra.searchpath=[file://{tmp_path}]", "experiment=mine"])
    (folder / "mine.yaml").write_text("defaults:\n  - override /model: llama3_8b\n")
    with pytest.raises(UserError, match=r"`experiment`: unknown key.*experiment/mine.yaml.*# @package _global_"):
        compose([f"hydra.searchpath=[file://{tmp_path}]", "experiment=mine"])
    unknown = "".join(f"  key{number}: 1\n" for number in range(1_000))
    (folder / "mine.yaml").write_text(f"# @package _global_\ntrainer:\n{unknown}")
    with pytest.raises(UserError, match=r"`trainer.key\d+`: unknown key in experiment/mine.yaml"):
        compose([f"hydra.searchpath=[file://{tmp_path}]", "experiment=mine"])


@pytest.mark.parametrize(
    "words, expected",
    [
        (["peft.rnak=8"], "`peft.rnak`: unknown key; did you mean `peft.rank`?"),
        (["rnak=8"], "did you mean `peft.rank`?"),
        (["trainer.max_step=8"], "did you mean `trainer.max_steps`?"),
        (["peft.rank=abc"], "`peft.rank=abc`: Value 'abc' of type 'str' could not be converted to Integer"),
        (["trainer.deterministic=perhaps"], "`trainer.deterministic=perhaps`"),
        (["optimizer.lr=fast"], "`optimizer.lr=fast`"),
        (["model=smollm2"], "`model=smollm2`: there is no such choice. Choices that begin so: smollm2_135m"),
        (["model=lama3_8b"], "`model=lama3_8b`: there is no such choice; did you mean `llama3_8b`?"),
        (["experiment=smokey"], "did you mean `smoke`?"),
        (["optimzer=adam"], "did you mean `optimizer`?"),
        (["trainer.seq_length="], "trainer.seq_length"),
        (["data.path=~/my data"], "write data.path=$HOME/my data"),
        (["data.path=~somebody/x"], "data.path=~somebody/x: the shell leaves ~ as it is here; write the whole path"),
        (["data.path=ü.json"], """Text is quoted, for the shell as well: 'data.path="ü.json"'"""),
        (["a=[b"], "a=[b: can't be read as KEY=VALUE"),
    ],
)
def test_mistakes_are_named(words, expected):
    with pytest.raises(UserError) as error:
        compose(words)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "group, content, expected",
    [
        ("experiment", "# @package _global_\ntrainer: {max_stepss: 3}", "`trainer.max_stepss`: unknown key in "),
        ("experiment", "# @package _global_\nhydra: {sweeper: {grid: 3}}", "`hydra.sweeper.grid`: unknown key in "),
        ("peft", "defaults: [lora]\nrnak: 3", "`peft.rnak`: unknown key in "),
        ("experiment", "# @package _global_\ntrainer.max_steps: 3", "`trainer.max_steps`: unknown key in "),
    ],
)
def test_mistyped_keys_of_a_file_are_named(group, content, expected, tmp_path):
    (tmp_path / group).mkdir()
    (tmp_path / group / "mine.yaml").write_text(content)
    with pytest.raises(UserError) as error:
        compose([f"hydra.searchpath=[file://{tmp_path}]", f"{group}=mine"], with_hydra=True)
    assert f"{expected}{group}/mine.yaml" in str(error.value)


def test_a_choice_without_override(tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\ndefaults:\n  - model: llama3_8b\n")
    with pytest.raises(UserError, match=r"in the defaults of experiment/mine\.yaml; .*`override /model: llama3_8b`$"):
        compose([f"hydra.searchpath=[file://{tmp_path}]", "experiment=mine"])


def test_a_file_that_has_changed_is_read_again(tmp_path):
    """Within a second, and to a text of the same length; what was composed before stays as it was."""
    (tmp_path / "model").mkdir()
    file = tmp_path / "model" / "mine.yaml"
    composed = []
    for path in ("a", "b", "a"):
        file.write_text(f"defaults: [hf]\npath: {path}\n")
        composed.append(compose([f"hydra.searchpath=[file://{tmp_path}]", "model=mine"]))
    assert [cfg.model.path for cfg in composed] == ["a", "b", "a"]


def test_flatten_names_every_key():
    keys = set(key_paths(compose()))
    assert {"peft", "peft.rank", "model.architecture.hidden_size", "launch.nnodes"} <= keys


def command(*words):
    """Run `python -m posttrain` with `words`; (exit code, stdout, stderr, seconds)."""
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "posttrain", *words], capture_output=True, text=True, cwd=CONF_DIR)
    return done.returncode, done.stdout, done.stderr, time.perf_counter() - began


def test_a_mistyped_key_exits_with_2_and_no_traceback(tmp_path):
    code, out, err, seconds = command("peft.rnak=8", f"hydra.run.dir={tmp_path / 'run'}")
    assert code == 2
    assert "peft.rank" in err and "Traceback" not in err + out
    assert not (tmp_path / "run").exists()
    assert seconds < 10  # 0.7 s on a quiet machine


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    code, out, err, _ = command("parallelism=single", f"hydra.run.dir={tmp_path}/file/run")
    said = f"hydra.run.dir={tmp_path}/file/run: {tmp_path}/file is not a directory; choose another place"
    assert (code, out, err) == (2, "", f"posttrain: {said}\n")


def test_only_errors_about_places_are():
    for error, said in (
        (PermissionError(errno.EACCES, "Permission denied", "/etc/x"), "/etc/x: Permission denied"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "x"), None),
        (OSError(errno.EIO, "Input/output error", "x"), None),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), None),
    ):
        assert location_error(error) == said


@pytest.mark.parametrize(
    "option, said",
    [
        ("--dry-run", "--dry-run: no such option"),
        (
            "--max-steps",
            "--max-steps: no such option; did you mean `trainer.max_steps`?; settings are written KEY=VALUE",
        ),
        ("--learning-rate=2e-5", "--learning-rate=2e-5: no such option; here it is `optimizer.lr=2e-5`"),
    ],
)
def test_an_option_of_another_program_is_one_line(monkeypatch, capsys, option, said):
    monkeypatch.setattr(sys, "argv", ["posttrain", "peft.rank=8", option])
    with pytest.raises(SystemExit) as ended:
        cli_command.run(lambda cfg: None)
    err = capsys.readouterr().err
    assert ended.value.code == 2 and said in err and err.count("\n") == 1 and "usage" not in err


def test_rerun_of_a_pickle_is_refused():
    code, _, err, _ = command("--experimental-rerun", "x.pickle")
    assert code == 2 and "unpickles" in err


def test_composing_imports_nothing_heavy():
    program = (
        "import sys; import posttrain.__main__, posttrain.launch; from posttrain.spec.checks import check;"
        "from posttrain.config.composition import compose; check(compose(), 0);"
        "print([m for m in ('torch', 'megatron', 'transformers', 'datasets', 'pandas') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_file_of_a_group_that_overrides_no_group_is_explained(tmp_path, monkeypatch):
    """The keys that are suggested are of a configuration that composes, not of the same broken one again."""
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "broken.yaml").write_text("# @package _global_\ndefaults:\n  - override /nothing: x\n")
    words = [f"hydra.searchpath=[file://{tmp_path}]", "experiment=broken"]
    monkeypatch.setattr(sys, "argv", ["posttrain", *words])
    with pytest.raises(UserError, match="nothing"):
        compose(words)
