"""Inference with the trained network of a run: evaluate, predict, export."""

from cnntrain.inference.evaluation import Evaluation as Evaluation
from cnntrain.inference.evaluation import evaluate as evaluate
from cnntrain.inference.exporting import Exported as Exported
from cnntrain.inference.exporting import ExportError as ExportError
from cnntrain.inference.exporting import export as export
from cnntrain.inference.prediction import Prediction as Prediction
from cnntrain.inference.prediction import predict as predict
from cnntrain.inference.trained import Trained as Trained
from cnntrain.inference.trained import load_trained as load_trained
