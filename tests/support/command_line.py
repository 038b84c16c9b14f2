"""How tests call the command line."""

import sys

from conftest import ROOT

QUICK = ["data=fashion_mnist_mini", "trainer.max_epochs=1", "+trainer.limit_train_batches=3"]
SCALARS = "tensorboard=scalars"  # where no picture is tested: they take longer than the training
TRAIN = [sys.executable, str(ROOT / "train.py")]
