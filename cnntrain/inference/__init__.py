"""A finished run put to use: evaluated, shown pictures, exported."""

from cnntrain.inference.evaluation import Evaluation, evaluate, evaluate_trained
from cnntrain.inference.exporting import Exported, Mismatch, export
from cnntrain.inference.prediction import Prediction, predict
from cnntrain.inference.trained import Trained, load_trained

__all__ = [
    "Evaluation",
    "Exported",
    "Mismatch",
    "Prediction",
    "Trained",
    "evaluate",
    "evaluate_trained",
    "export",
    "load_trained",
    "predict",
]
