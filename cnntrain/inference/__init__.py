"""Inference with the trained network of a run: evaluate, predict, export."""

from cnntrain.inference.evaluation import Evaluation, evaluate
from cnntrain.inference.exporting import Exported, ExportError, export
from cnntrain.inference.prediction import Prediction, predict
from cnntrain.inference.trained import Trained, load_trained

__all__ = [
    "Evaluation",
    "ExportError",
    "Exported",
    "Prediction",
    "Trained",
    "evaluate",
    "export",
    "load_trained",
    "predict",
]
