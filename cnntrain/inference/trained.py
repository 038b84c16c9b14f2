"""What a run has left: its network with the weights of a checkpoint, and what it was trained on."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from omegaconf import DictConfig, open_dict
from torch import Tensor, nn

from cnntrain.config import ConfigError, as_config_error, build, check, compose
from cnntrain.config.resume import CHECKPOINTS, has_run
from cnntrain.data import ImageData
from cnntrain.training.building import build_network
from cnntrain.training.checkpoint_file import (
    BEST,
    LAST,
    CheckpointError,
    Content,
    DamagedError,
    read,
)
from cnntrain.training.checkpoints import shape_differences

Device = Literal["auto", "cpu", "cuda", "mps"]
NAMED = {"best": BEST, "last": LAST}


@dataclass(frozen=True)
class Trained:
    """A network that is ready to be asked."""

    run: Path
    checkpoint: Path
    epoch: int  # whose weights these are, from 1
    cfg: DictConfig  # of the run; its backend may be another one
    data: ImageData  # not read
    network: nn.Module  # in evaluation, on `device`
    device: torch.device

    @property
    def backend(self) -> str:
        """The class of the convolutions."""
        target: str = self.cfg.backend._target_
        return target.rpartition(".")[2]


def load_trained(
    run: str | os.PathLike[str],
    checkpoint: str | os.PathLike[str] = "best",
    *,
    backend: str | DictConfig | None = None,
    device: Device = "auto",
    root: str | os.PathLike[str] | None = None,
) -> Trained:
    """The network of the run in the folder `run`, on `backend`, whatever it was trained on.

    `checkpoint` is best, last, or a file. `backend` is a choice by name or a node of a config.
    `root` is the data set's folder where that is not the one that the run had.

    Raises:
        ConfigError: There is no such run or checkpoint, or the network cannot be built.
        CheckpointError: The checkpoint cannot be used.
    """
    folder = Path(run)
    path = _checkpoint(folder, checkpoint)
    content = read(path)
    cfg = _config(path, content, backend)
    with open_dict(cfg):
        if root is not None:
            if "root" not in cfg.data:
                raise ConfigError([f"root={root}: the data set of this run has no folder"])
            cfg.data.root = os.fspath(root)
    with as_config_error("data"):
        data = build(cfg.data)
    network = build_network(cfg, data)
    weights = {
        name.removeprefix("network."): tensor
        for name, tensor in content["state_dict"].items()
        if name.startswith("network.")
    }
    if different := shape_differences(weights, network.state_dict()):
        raise CheckpointError(f"{path}: is of another network: {'; '.join(different)}")
    network.load_state_dict(weights)
    where = choose_device(device)
    return Trained(folder, path, content["epoch"] + 1, cfg, data, network.eval().to(where), where)


def _checkpoint(folder: Path, checkpoint: str | os.PathLike[str]) -> Path:
    """The file; ConfigError if there is none."""
    if not has_run(folder):
        home = "; ~ is not expanded there" if str(folder).startswith("~") else ""
        raise ConfigError([f"run={folder}: holds no run; name the folder of one{home}"])
    if str(checkpoint) not in NAMED:
        if not Path(checkpoint).is_file():
            raise ConfigError([f"checkpoint={checkpoint}: is no file; take best, last, or a path"])
        return Path(checkpoint)
    path = folder / CHECKPOINTS / NAMED[str(checkpoint)]
    if not path.exists():
        others = sorted((folder / CHECKPOINTS).glob("*.ckpt"))
        there = ", ".join(map(str, others)) or "none: the run was not saved yet"
        raise ConfigError([f"checkpoint={checkpoint}: {path} is missing; there is {there}"])
    return path


def _config(path: Path, content: Content, backend: str | DictConfig | None) -> DictConfig:
    """Of the run that has written a checkpoint, on another `backend` if one is given.

    It is checked as one that is typed: nothing that a stranger has put into it is called.
    """
    weights, epoch, config = (content.get(name) for name in ("state_dict", "epoch", "config"))
    whole = isinstance(epoch, int) and isinstance(config, dict) and isinstance(weights, dict)
    if not whole or any(not isinstance(tensor, Tensor) for tensor in dict(weights or {}).values()):
        raise DamagedError(f"{path}: has no weights or no config in it")
    cfg = DictConfig(config)
    if isinstance(backend, str):
        backend = compose([f"backend={backend}"]).backend
    if backend is not None:
        with open_dict(cfg):
            cfg.backend = backend
    if problems := check(cfg):
        raise CheckpointError(f"{path}: the config in it cannot be used: {problems[0]}")
    return cfg


def choose_device(device: Device) -> torch.device:
    """The device of this name; of `auto` the first that this machine has. ConfigError if it is not
    there."""
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    for name, there in available.items():
        if there and device in (name, "auto"):
            return torch.device(name)
    raise ConfigError(
        [f"device={device}: this machine has no GPU that PyTorch can use; take device=cpu or auto"]
    )
