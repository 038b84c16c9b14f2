"""Finished runs for tests of inference."""

import subprocess
from pathlib import Path
from typing import Any

import torch
from forked import run_command
from torch import nn

from cnntrain.config import build, compose
from cnntrain.training import train

OPTIONS = [
    "data=fashion_mnist_mini",
    "backend=im2col",
    "trainer=cpu",
    "trainer.max_epochs=2",
    "trainer.progress_bar=false",
    "tensorboard=scalars",
]
FEW = "+trainer.limit_train_batches=10"


def finished(directory: Path, *options: str) -> Path:
    train(compose([*OPTIONS, *options]), directory)
    return directory


def command(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """`cnntrain <arguments>` in a process."""
    return run_command(arguments, cwd)


def plain_network(run: Path, checkpoint: str = "best", *options: str) -> nn.Module:
    """Network of a run on nn.Conv2d, loaded with plain PyTorch."""
    cfg = compose([*OPTIONS, *options])
    network = build(cfg.model, conv=nn.Conv2d, in_shape=(1, 28, 28), num_classes=10)
    state = torch.load(run / f"checkpoints/{checkpoint}.ckpt", weights_only=True)["state_dict"]
    network.load_state_dict({name.removeprefix("network."): t for name, t in state.items()})
    return network.eval()


def answers(network: nn.Module, loader: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits in float64, and labels."""
    images, labels = zip(*loader, strict=True)
    with torch.no_grad():
        logits = torch.cat([network(batch) for batch in images])
    return logits.double(), torch.cat(labels)
