"""MLflow, by its client: what Megatron-Bridge does with a run of the whole process does nothing to ours."""

import os
import time
from dataclasses import dataclass
from itertools import batched
from typing import Any
from urllib.parse import urlsplit

from posttrain.config.trial_names import flatten
from posttrain.errors import UserError
from posttrain.train.trackers.tracker import TrackedRun, Tracker, require
from posttrain.utils import rundir

FILE = "mlflow.json"  # in a run directory: the run's id
MOST_PARAMS = 100  # in one request
LONGEST = 6000  # characters of one


@dataclass
class MLflow(Tracker):
    """MLflow; without a tracking server the run is kept in RUN_DIR/mlruns.

    What is None is taken from mlflow's own environment variables.
    """

    experiment: str | None = None
    tracking_uri: str | None = None

    def check(self) -> None:
        """See that mlflow is there.

        Raises:
            UserError: it isn't; or the address has a password in it, which would be written with the configuration.
        """
        require("mlflow", "mlflow")
        if urlsplit(self.tracking_uri or "").password:
            raise UserError(
                "logger.mlflow.tracking_uri: has a password in it; give it in the environment instead: "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
            )

    def start(self, run: TrackedRun) -> None:
        self.store = run.directory.absolute() / "mlruns"
        self.uri = self.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or self.store.as_uri()
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # mlflow would rather have a database
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self.client = MlflowClient(tracking_uri=self.uri)
        run_id = run.known_id(FILE)
        if run_id is not None:
            self.client.update_run(run_id, status="RUNNING")
            self.run_id: str = run_id
            return
        name = self.experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME") or "posttrain"
        known = self.client.get_experiment_by_name(name)
        experiment_id = known.experiment_id if known else self.client.create_experiment(name)
        tags = {"sweep": run.group} if run.group else {}
        self.run_id = self.client.create_run(experiment_id, tags=tags, run_name=run.name).info.run_id
        rundir.write_json(run.directory, FILE, {"id": self.run_id})
        params = [Param(key, str(value)[:LONGEST]) for key, value in flatten(run.recorded_config).items()]
        for some in batched(params, MOST_PARAMS):
            self.client.log_batch(self.run_id, params=some)

    def log(self, step: int, values: dict[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(key, value, now, step) for key, value in values.items()]
        self.client.log_batch(self.run_id, metrics=metrics)

    def table(self, step: int, name: str, rows: list[dict[str, str]]) -> None:
        columns: dict[str, list[str | int]] = {"step": [step] * len(rows)}
        for key in rows[0]:
            columns[key] = [row[key] for row in rows]
        self.client.log_table(self.run_id, columns, f"{name}.json")

    def finish(self, summary: dict[str, Any]) -> str | None:
        for key, value in summary.items():
            self.client.set_tag(self.run_id, f"summary.{key}", value)
        self.client.set_terminated(self.run_id)
        if self.uri == self.store.as_uri():
            return f"mlflow: kept in {self.store}; to look at it: mlflow ui --backend-store-uri {self.uri}"
        return f"mlflow: run {self.run_id}"
