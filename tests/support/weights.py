"""Weights loaded by PyTorch's own means."""

from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn

from cnntrain.config import build


def load(cfg: DictConfig, checkpoint: Path, **options: Any) -> nn.Module:
    """A network with a checkpoint's weights, by PyTorch's own means."""
    network = build(cfg.model, conv=build(cfg.backend), **options)
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    state = {k.removeprefix("network."): v for k, v in state.items() if k.startswith("network.")}
    network.load_state_dict(state)
    return network.eval()
