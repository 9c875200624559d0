"""Experiment trackers, written to by the first rank. No tracker library at import."""

from posttrain.train.trackers.csv_file import Csv
from posttrain.train.trackers.mlflow_store import MLflow
from posttrain.train.trackers.tensorboard import TensorBoard
from posttrain.train.trackers.tracker import Resumed, TrackedRun, Tracker
from posttrain.train.trackers.trackio_project import Trackio
from posttrain.train.trackers.weights_and_biases import Wandb

__all__ = ["Csv", "MLflow", "Resumed", "TensorBoard", "TrackedRun", "Tracker", "Trackio", "Wandb"]
