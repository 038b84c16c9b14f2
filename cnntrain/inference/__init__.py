"""A finished run put to use: evaluated, shown pictures, exported."""

from cnntrain.inference.evaluation import Evaluation, evaluate, evaluate_trained
from cnntrain.inference.exporting import (
    Exported,
    ExportError,
    Mismatch,
    export,
    export_trained,
)
from cnntrain.inference.prediction import Prediction, predict
from cnntrain.inference.trained import Trained, load_trained

__all__ = [
    "Evaluation",
    "ExportError",
    "Exported",
    "Mismatch",
    "Prediction",
    "Trained",
    "evaluate",
    "evaluate_trained",
    "export",
    "export_trained",
    "load_trained",
    "predict",
]
