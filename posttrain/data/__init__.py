"""Instruction and chat data: format -> conversations -> text, ids and mask -> packing -> dataset."""

from posttrain.data.training_data import Splits, TrainingData

__all__ = ["Splits", "TrainingData"]
