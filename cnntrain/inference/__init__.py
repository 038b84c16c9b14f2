"""Inference with the trained network of a run: evaluate, predict, export."""

from cnntrain.inference.evaluation import Evaluation, evaluate, evaluate_trained
from cnntrain.inference.exporting import Exported, ExportError, export, export_trained
from cnntrain.inference.prediction import Prediction, predict
from cnntrain.inference.trained import Trained, load_trained

__all__ = [
    "Evaluation",
    "ExportError",
    "Exported",
    "Prediction",
    "Trained",
    "evaluate",
    "evaluate_trained",
    "export",
    "export_trained",
    "load_trained",
    "predict",
]
