"""From a config to a finished run."""

from cnntrain.training.objective import CrossEntropy, OneCycle, WarmupCosine
from cnntrain.training.run import Result, train
from cnntrain.training.trainer import Trainer

__all__ = ["CrossEntropy", "OneCycle", "Result", "Trainer", "WarmupCosine", "train"]
