"""Training: the `train` function, losses, schedules, optimizers and callbacks."""

from cnntrain.training.building import dry_run
from cnntrain.training.checkpoint_file import CheckpointError
from cnntrain.training.distributed import ProcessLost
from cnntrain.training.insights import Insights
from cnntrain.training.nan_guard import NonFiniteError
from cnntrain.training.optim import CrossEntropy, HalfSquaredError, Muon, OneCycle, WarmupCosine
from cnntrain.training.profile import Profile
from cnntrain.training.run import Pruned, train
from cnntrain.training.run_directory import Result
from cnntrain.training.trainer import Trainer

__all__ = [
    "CheckpointError",
    "CrossEntropy",
    "HalfSquaredError",
    "Insights",
    "Muon",
    "NonFiniteError",
    "OneCycle",
    "ProcessLost",
    "Profile",
    "Pruned",
    "Result",
    "Trainer",
    "WarmupCosine",
    "dry_run",
    "train",
]
