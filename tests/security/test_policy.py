"""What is the command line's alone, in files of a stranger's: refused by name; the same words typed are taken."""

import sys
from pathlib import Path

import pytest
import yaml

from posttrain import __main__ as run
from posttrain import preview
from posttrain.config import policy
from posttrain.config.composition import compose
from posttrain.config.schema import SlurmSchema
from posttrain.convert import __main__ as convert
from posttrain.errors import UserError
from posttrain.sweep import slurm

GLOBAL = "# @package _global_\n"


@pytest.fixture
def site(tmp_path):
    """Write files into a folder; returns the word that names it."""

    def write(**files):
        for name, content in files.items():
            path = tmp_path / f"{name}.yaml"
            path.parent.mkdir(parents=True, exist_ok=True)
            head = GLOBAL if name.startswith("experiment/") else ""
            path.write_text(head + (content if isinstance(content, str) else yaml.safe_dump(content)))
        return f"hydra.searchpath=[file://{tmp_path}]"

    return write


def refused(words, name="config"):
    with pytest.raises(UserError) as error:
        compose(words, config_name=name, with_hydra=True)
    return str(error.value)


EXPERIMENTS = {
    "launch.nnodes": {"launch": {"nnodes": 2}},
    "launch.node_rank": {"launch": {"node_rank": 1}},
    "launch.master_addr": {"launch": {"master_addr": "198.51.100.1"}},
    "launch.master_port": {"launch": {"master_port": 29500}},
    "launch.submit": {"launch": {"submit": True}},
    "cache_dir": {"cache_dir": "/home/me/.ssh"},
    "hydra.mode": {"hydra": {"mode": "MULTIRUN"}},
    "hydra.run.dir": {"hydra": {"run": {"dir": "/home/me"}}},
    "hydra.sweep.dir": {"hydra": {"sweep": {"dir": "/home/me"}}},
    "hydra.sweep.subdir": {"hydra": {"sweep": {"subdir": ".."}}},
    "hydra.job.chdir": {"hydra": {"job": {"chdir": True}}},
    "hydra.output_subdir": {"hydra": {"output_subdir": "checkpoints"}},
    "hydra.runtime.output_dir": {"hydra": {"runtime": {"output_dir": "/home/me"}}},
    "hydra.verbose": {"hydra": {"verbose": True}},
    "hydra.launcher": {"hydra": {"launcher": {"_target_": "hydra_plugins.posttrain_launcher.SlurmLauncher"}}},
    "hydra.sweeper": {"hydra": {"sweeper": {"storage": "sqlite:////elsewhere/x.db"}}},
    "hydra.overrides": {"hydra": {"overrides": {"hydra": ["hydra.launcher._target_=payload.Fire"]}}},
    "launch.master_addr through an interpolation": {"launch": {"master_addr": "${run.name}"}, "run": {"name": "a"}},
    "logger.w.entity": {"logger": {"w": {"_target_": "posttrain.train.trackers.Wandb", "entity": "theirs"}}},
    "logger.w._args_": {"logger": {"w": {"_target_": "posttrain.train.trackers.Wandb", "_args_": ["p", "theirs"]}}},
    "logger.w.entity of a whole tracker elsewhere": {
        "logger": {"w": "${oc.create:'{_target_: posttrain.train.trackers.Wandb, entity: theirs}'}"}
    },
}


@pytest.mark.parametrize("what", EXPERIMENTS)
def test_a_file_may_not_set(what, site):
    said = refused([site(**{"experiment/evil": EXPERIMENTS[what]}), "experiment=evil"])
    assert what.split()[0] in said and "experiment/evil.yaml" in said


@pytest.mark.parametrize(
    "key",
    ["launch.master_addr", "launch", "hydra.launcher._target_", "+hydra.launcher.setup", "hydra/launcher",
     "+model@hydra.launcher", "cache_dir"],
)  # fmt: skip
def test_a_search_space_in_a_file_may_not_hold(key, site):
    evil = {"hydra": {"sweeper": {"params": {key: "x"}}}}
    assert "hydra.sweeper.params" in refused([site(**{"experiment/evil": evil}), "experiment=evil"])


WHOLE = {
    "preview.out": (preview.main, [], {"defaults": ["preview"], "preview": {"out": "/home/me/.bashrc"}}),
    "preview.html": (preview.main, [], {"defaults": ["preview"], "preview": {"html": "/home/me/.bashrc"}}),
    "convert.out": (convert.main, ["import"], {"defaults": ["convert"], "convert": {"out": "/home/me"}}),
    "convert.private": (convert.main, ["import"], {"defaults": ["convert"], "convert": {"private": False}}),
    "hydra.searchpath": (run.main, [], {"defaults": ["config"], "hydra": {"searchpath": ["file:///elsewhere"]}}),
    "hydra.launcher._target_": (run.main, [], {"defaults": ["config", {"override /hydra/launcher": "slurm"}]}),
}


@pytest.mark.parametrize("key", WHOLE)
def test_nor_a_whole_configuration(key, site, tmp_path, monkeypatch, capsys):
    main, words, body = WHOLE[key]
    overriding = [item for item in body["defaults"] if isinstance(item, dict)]
    body["defaults"] = [*(item for item in body["defaults"] if item not in overriding), "_self_", *overriding]
    site(evil=body)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["posttrain", *words, "--config-dir", str(tmp_path), "--config-name", "evil"])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    with pytest.raises(SystemExit) as stopped:
        main()
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and key in said and "from no file" in said


@pytest.mark.parametrize("word", ["hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir", "hydra.job.name"])
def test_a_place_with_a_line_end_is_refused_even_where_typed(word):
    assert word in refused([f"{word}='a\nscancel 1'"])


@pytest.mark.parametrize(
    "changed, folder",
    [({"partition": "a\nid"}, "f"), ({"sbatch": {"x\nid": 1}}, "f"), ({"srun_args": ["a\nid"]}, "f"),
     ({"python": "python\nid"}, "f"), ({"sbatch": {"a": "b\rid"}}, "f"), ({"sbatch": {"a b": 1}}, "f"), ({}, "f\nid")],
)  # fmt: skip
def test_no_value_begins_a_line_of_a_batch_script(changed, folder, tmp_path):
    pytest.importorskip("submitit")
    with pytest.raises(UserError, match=r"control character|not the name"):
        slurm.make_executor(SlurmSchema(**changed), tmp_path / folder)


def test_a_database_of_a_search_is_refused_in_a_line():
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    said = refused(["hydra/sweeper=optuna", "hydra.sweeper.storage=sqlite:///x.db"])
    assert "hydra.sweeper.storage: not supported" in said


def test_nor_where_the_shipped_files_are(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["posttrain", "--config-path", str(tmp_path)])
    with pytest.raises(SystemExit, match="2"):
        run.main()
    assert "--config-path: refused" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["schema", "hydra/config", "hydra/launcher/slurm_schema", "hydra/job_logging/mine"])
def test_a_file_in_the_place_of_one_of_hydras(name, site):
    word = site(**{name: {"launcher": {"setup": ["id"]}}, "experiment/fine": {}})
    more = ["hydra/launcher=slurm"] if "launcher" in name else []
    more = ["hydra/job_logging=mine"] if "logging" in name else more
    assert name in refused([word, "experiment=fine", *more])


def test_what_a_file_may_set_and_what_is_typed_is_taken(site):
    mine = {
        "launch": {"timeout_s": 60},
        "hydra": {"launcher": {"gpus_per_node": 8}, "sweeper": {"params": {"optimizer.lr": "1e-3,1e-4"}}},
    }
    word = site(
        **{
            "experiment/mine": mine,
            "hydra/launcher/site": "defaults: [slurm]\nsetup: [module load cuda]\n",
            "logger/team": "# @package logger.team\n_target_: posttrain.train.trackers.Wandb\nentity: ours\n",
        }
    )
    typed = ["launch.nnodes=2", "launch.master_addr=a", "+hydra.launcher.sbatch.nodelist=n7", "cache_dir=/scratch"]
    typed += ["hydra.run.dir=here", "hydra/launcher=site", "logger=team", "hydra.launcher.partition=gpu"]
    cfg = compose([word, "experiment=mine", *typed], with_hydra=True)
    assert (cfg.launch.nnodes, cfg.launch.master_addr, cfg.launch.timeout_s) == (2, "a", 60)
    assert (cfg.hydra.launcher.setup, cfg.hydra.launcher.gpus_per_node) == (["module load cuda"], 8)
    assert (cfg.logger.team.entity, cfg.cache_dir, cfg.hydra.run.dir) == ("ours", "/scratch", "here")
    assert compose([word, "experiment=mine", *typed, "logger.team.entity=other"]).logger.team.entity == "other"


def test_the_tables_in_the_documentation():
    page = Path(__file__).parents[2] / "docs" / "security.md"
    assert policy.table() in page.read_text()
