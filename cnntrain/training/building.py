"""The objects of a run, built from its config."""

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path

import lightning.pytorch as lightning
import torch
from omegaconf import DictConfig
from torch import nn

from cnntrain.config import as_config_error, build
from cnntrain.data import ImageData
from cnntrain.process_info import ProcessInfo
from cnntrain.training.classifier import Classifier
from cnntrain.training.distributed import ProcessEnvironment
from cnntrain.training.epoch_log import EpochLog
from cnntrain.training.insights import Insights
from cnntrain.training.nan_guard import NaNGuard
from cnntrain.training.step_graph import CUDAGraphs
from cnntrain.training.tensorboard import TensorBoard
from cnntrain.training.trainer import Trainer


def dry_run(cfg: DictConfig) -> None:
    """Build everything that a run builds, and train one step on zeros on the CPU.

    Writes nothing. Raises ConfigError with the node and the message of the constructor or step.
    """
    data, module = build_run(cfg)
    with as_config_error("model"):
        logits = module.network(torch.zeros(2, *data.shape))
        if logits.shape != (2, data.num_classes):
            raise ValueError(f"gives {tuple(logits.shape)} for two images of {data.shape}")
    with as_config_error("loss"):
        loss = module.loss(logits, torch.zeros(2, dtype=torch.long))
        if loss.ndim:
            raise ValueError("must give one number for a batch")
        loss.backward()
    if "tensorboard" in cfg:
        with as_config_error("tensorboard"):
            build(cfg.tensorboard)
    with as_config_error("trainer"):
        trainer = build(cfg.trainer, default_root_dir=Path(), logger=False)
    with as_config_error("data"):
        batches = -(-(data.train_size - data.val_size) // data.batch_size)
    optimizer, _ = module.schedule(batches * trainer.max_epochs)
    with as_config_error("optimizer"):
        optimizer.step()


def build_run(cfg: DictConfig) -> tuple[ImageData, Classifier]:
    """The data set, not yet loaded, and the Lightning module."""
    quieten_lightning()
    lightning.seed_everything(cfg.seed, verbose=False)
    with as_config_error("data"):
        data = build(cfg.data)
    network = build_network(cfg, data)
    with as_config_error("loss"):
        loss = build(cfg.loss)
    with as_config_error("optimizer"):
        optimizer = build(cfg.optimizer)
        optimizer(params=network.parameters())  # raises before the data is loaded
    scheduler = build(cfg.scheduler) if cfg.scheduler else None
    return data, Classifier(network, loss, optimizer, scheduler, seed=cfg.seed)


def build_network(cfg: DictConfig, data: ImageData) -> nn.Module:
    """The network of a run, newly initialised."""
    with as_config_error("model"):
        return build(
            cfg.model, conv=build(cfg.backend), in_shape=data.shape, num_classes=data.num_classes
        )


def build_record(cfg: DictConfig, directory: Path, data: ImageData) -> EpochLog:
    """The metrics.csv and TensorBoard logger of rank 0."""
    board = TensorBoard(directory)
    if "tensorboard" not in cfg:  # ~tensorboard, or a run of an earlier version
        return EpochLog(directory, board, Insights.none(board=board, data=data))
    with as_config_error("tensorboard"):
        return EpochLog(directory, board, build(cfg.tensorboard, board=board, data=data))


def build_trainer(
    cfg: DictConfig,
    info: ProcessInfo,
    directory: Path,
    data: ImageData,
    module: Classifier,
    record: EpochLog | None = None,
    further: Sequence[lightning.Callback] = (),
) -> Trainer:
    """The trainer of one rank; rank 0 has a record and `further` callbacks."""
    callbacks: list[lightning.Callback] = [NaNGuard(directory, *data.split())]
    callbacks += [record, record.insights] if record else []
    with as_config_error("trainer"):
        trainer: Trainer = build(
            cfg.trainer,
            processes=ProcessEnvironment(info),
            default_root_dir=directory,
            logger=record.tensorboard if record else False,
            callbacks=[*callbacks, *further],
        )
    if trainer.channels_last:
        module.network.to(memory_format=torch.channels_last)
    if trainer.compile_network:
        module.network.compile()
    if trainer.cuda_graphs:
        module.recorder = CUDAGraphs()
    return trainer


def quieten_lightning() -> None:
    """Silence Lightning's tips, and warnings about intended settings."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*Checkpoint directory .* exists and is not empty.*")
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*GPU available but not used.*")
    warnings.filterwarnings("ignore", ".*number of training batches .* smaller than the logging.*")
    warnings.filterwarnings("ignore", ".*ended before the epoch ended.*not resumable.*")
    warnings.filterwarnings("ignore", ".*LeafSpec.*")
    warnings.filterwarnings("ignore", ".*`srun` command is available .* but is not used.*")
    # Metrics are summed over the ranks already, and each image is tested once.
    warnings.filterwarnings("ignore", ".*sync_dist=True.*")
    warnings.filterwarnings("ignore", ".*it is recommended to use `Trainer.devices=1.*")
