"""What deploy/ starts composes, and its files are what their readers take."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from posttrain.cli import command, subcommands
from posttrain.spec import checks

ROOT = Path(__file__).resolve().parents[1]
JOB = yaml.safe_load((ROOT / "deploy" / "trainjob.yaml").read_text())
TASK = yaml.safe_load((ROOT / "deploy" / "skypilot.yaml").read_text())
DOCKERFILE = (ROOT / "Dockerfile").read_text()


def started_by_skypilot() -> list[str]:
    program, name, *overrides = shlex.split(TASK["run"].replace("\\\n", ""))
    assert (program, name) == (".venv/bin/posttrain", subcommands.TRAIN)
    return overrides


@pytest.mark.parametrize("overrides", [JOB["spec"]["trainer"]["args"], started_by_skypilot()], ids=["job", "task"])
def test_the_overrides_compose(overrides):
    cfg = command.compose([one for one in overrides if not one.startswith("hydra.")])
    checks.check_ranges(cfg)
    checks.check_trainer(cfg, visible_gpus=8)


def test_the_machines_of_the_job_make_whole_groups():
    trainer = JOB["spec"]["trainer"]
    assert trainer["command"] == ["torchrun", "-m", "posttrain"]
    assert int(trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"]) == trainer["numProcPerNode"]
    cfg = command.compose([one for one in trainer["args"] if not one.startswith("hydra.")])
    assert trainer["numNodes"] * trainer["numProcPerNode"] % cfg.parallelism.tensor_model_parallel_size == 0


def test_volumes_are_those_that_are_mounted():
    """In the image: what is mounted is what it writes to, and its user may."""
    (patch,) = JOB["spec"]["runtimePatches"]
    (job,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = job["template"]["spec"]["template"]["spec"]
    mounts = {mount["name"]: mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
    assert mounts.keys() == {volume["name"] for volume in pod["volumes"]}
    for folder in (mounts["work"], mounts["cache"]):
        assert re.search(rf"install --directory --owner=ubuntu.* {folder}\b", DOCKERFILE)
    assert DOCKERFILE.index("USER ubuntu") < DOCKERFILE.index("ENTRYPOINT")


def test_one_image_for_all():
    (image,) = re.findall(r"^FROM (\S+)$", DOCKERFILE, re.MULTILINE)
    assert TASK["resources"]["image_id"] == f"docker:{image}" and not image.endswith(":latest")


def test_the_job_as_kubeflow_reads_it():
    models = pytest.importorskip("kubeflow_trainer_api.models", reason="kubeflow-trainer-api is not installed")
    job = models.TrainerV1alpha1TrainJob.from_dict(JOB)
    lost = []
    compare(JOB, job.to_dict(), "", lost)
    assert not lost


def compare(written, read, place, lost):
    """Append to `lost` each place of `written` that `read` does not have."""
    if isinstance(written, dict):
        for key, value in written.items():
            compare(value, read.get(key) if isinstance(read, dict) else None, f"{place}.{key}", lost)
    elif isinstance(written, list):
        for index, value in enumerate(written):
            inside = isinstance(read, list) and index < len(read)
            compare(value, read[index] if inside else None, f"{place}[{index}]", lost)
    elif read != written:
        lost.append(place)


def test_the_task_as_skypilot_reads_it():
    schemas = pytest.importorskip("sky.utils.schemas", reason="skypilot is not installed")
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed")
    jsonschema.validate(TASK, schemas.get_task_schema())
    jsonschema.validate(TASK["resources"], schemas.get_resources_schema())
