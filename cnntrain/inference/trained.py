"""Trained network of a finished run: checkpoint, config, data set and network."""

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
from cnntrain.training import checkpoint_file
from cnntrain.training.building import build_network
from cnntrain.training.checkpoint_file import CheckpointError, Content, DamagedError
from cnntrain.training.checkpoints import shape_differences

Device = Literal["auto", "cpu", "cuda", "mps"]
FILES = {"best": checkpoint_file.BEST, "last": checkpoint_file.LAST}


@dataclass(frozen=True)
class Trained:
    """A trained network with its run."""

    run: Path  # directory
    checkpoint: Path
    epoch: int  # of the weights, starting with 1
    cfg: DictConfig  # of the run, possibly with another backend
    data: ImageData  # not read yet
    network: nn.Module  # in evaluation mode, on `device`
    device: torch.device

    @property
    def backend(self) -> str:
        """Class name of the convolutions."""
        return str(self.cfg.backend._target_).rpartition(".")[2]


def load_trained(
    run: "str | os.PathLike[str] | Trained",
    checkpoint: str | os.PathLike[str] = "best",
    *,
    backend: str | DictConfig | None = None,
    device: Device = "auto",
    root: str | os.PathLike[str] | None = None,
) -> Trained:
    """Load the network of a run.

    Args:
        run: Run directory, or a Result; a Trained is returned as it is.
        checkpoint: best, last, or a file.
        backend: Choice by name, or config node; None: that of the run.
        device: cpu, cuda, mps, or auto: a GPU if there is one.
        root: Folder of the data set; None: that of the run.

    Raises:
        ConfigError: There is no such run or checkpoint, or the network cannot be built.
        CheckpointError: The checkpoint is damaged or of another network.
    """
    if isinstance(run, Trained):
        return run
    folder = Path(run)
    path = _checkpoint_path(folder, checkpoint)
    content = checkpoint_file.read(path)
    cfg = _config(path, content, backend)
    if root is not None:
        if "root" not in cfg.data:
            raise ConfigError([f"root={root}: the data set of this run has no folder"])
        cfg.data.root = os.fspath(root)
    with as_config_error("data"):
        data = build(cfg.data)
    network = build_network(cfg, data)
    own = {k: tensor for k, tensor in content["state_dict"].items() if k.startswith("network.")}
    weights = {name.removeprefix("network."): tensor for name, tensor in own.items()}
    if differences := shape_differences(weights, network.state_dict()):
        raise CheckpointError(f"{path}: is of another network: {'; '.join(differences)}")
    network.load_state_dict(weights)
    place = choose_device(device)
    return Trained(folder, path, content["epoch"] + 1, cfg, data, network.eval().to(place), place)


def _checkpoint_path(folder: Path, checkpoint: str | os.PathLike[str]) -> Path:
    if not has_run(folder):
        hint = "; ~ is not expanded" if str(folder).startswith("~") else ""
        raise ConfigError([f"run={folder}: is not a run directory{hint}"])
    if str(checkpoint) not in FILES:
        if not Path(checkpoint).is_file():
            raise ConfigError([f"checkpoint={checkpoint}: no such file; use best, last, or a path"])
        return Path(checkpoint)
    path = folder / CHECKPOINTS / FILES[str(checkpoint)]
    if not path.exists():
        others = sorted((folder / CHECKPOINTS).glob("*.ckpt"))
        there = ", ".join(map(str, others)) or "none: the run has not saved one yet"
        raise ConfigError([f"checkpoint={checkpoint}: {path} is missing; there is {there}"])
    return path


def _config(path: Path, content: Content, backend: str | DictConfig | None) -> DictConfig:
    """Config in a checkpoint, with another `backend` if given.

    It is checked like one from the command line: a checkpoint from a stranger runs no code.
    """
    weights, epoch, config = (content.get(name) for name in ("state_dict", "epoch", "config"))
    complete = isinstance(epoch, int) and isinstance(config, dict) and isinstance(weights, dict)
    if not complete or not all(isinstance(t, Tensor) for t in dict(weights or {}).values()):
        raise DamagedError(f"{path}: has no weights or no config")
    cfg = DictConfig(config)
    if isinstance(backend, str):
        backend = compose([f"backend={backend}"]).backend
    if backend is not None:
        with open_dict(cfg):
            cfg.backend = backend
    if problems := check(cfg):
        raise CheckpointError(f"{path}: its config is invalid: {problems[0]}")
    return cfg


def choose_device(device: Device) -> torch.device:
    """Device by name; auto: the first available of cuda, mps and cpu. Raises ConfigError."""
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    available = ["cuda"] * cuda + ["mps"] * mps + ["cpu"]
    if device == "auto" or device in available:
        return torch.device(available[0] if device == "auto" else device)
    problem = f"device={device}: this machine has no GPU that PyTorch can use"
    raise ConfigError([f"{problem}; use device=cpu or auto"])
