"""Training: the `train` function, losses, schedules, optimizers and callbacks."""

from cnntrain.training.building import dry_run as dry_run
from cnntrain.training.checkpoint_file import CheckpointError as CheckpointError
from cnntrain.training.distributed import ProcessLost as ProcessLost
from cnntrain.training.insights import Insights as Insights
from cnntrain.training.losses import CrossEntropy as CrossEntropy
from cnntrain.training.losses import HalfSquaredError as HalfSquaredError
from cnntrain.training.nan_guard import NonFiniteError as NonFiniteError
from cnntrain.training.optim import Muon as Muon
from cnntrain.training.optim import OneCycle as OneCycle
from cnntrain.training.optim import WarmupCosine as WarmupCosine
from cnntrain.training.profile import Profile as Profile
from cnntrain.training.run import Pruned as Pruned
from cnntrain.training.run import train as train
from cnntrain.training.run_directory import Result as Result
from cnntrain.training.trainer import Trainer as Trainer
