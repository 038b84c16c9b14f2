"""The objects of a run, built from its config, and how each rank fits and tests."""

import contextlib
import logging
import os
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from cnntrain.config import as_config_error, build, config_hash
from cnntrain.data import ImageData
from cnntrain.interruption import Interrupted, interruption, watching
from cnntrain.models import deferred_weights
from cnntrain.process_info import TIMEOUT, ProcessInfo
from cnntrain.training import distributed
from cnntrain.training.classifier import Classifier
from cnntrain.training.epoch_log import EpochLog
from cnntrain.training.insights import Insights
from cnntrain.training.losses import CrossEntropy
from cnntrain.training.nan_guard import NaNGuard, NonFiniteError
from cnntrain.training.optim import build_optimizer
from cnntrain.training.step_graph import CUDAGraphs
from cnntrain.training.tensorboard import TensorBoard
from cnntrain.training.trainer import ProcessEnvironment, Trainer


def dry_run(cfg: DictConfig, resuming: bool = False) -> None:
    """Build everything that a run builds, and train one step on zeros on the CPU.

    Writes nothing. A resumed run has its weights in a checkpoint. Raises ConfigError with the node
    and the message of the constructor or step.
    """
    data, module = build_run(cfg)
    if not resuming:
        load_initial_weights(module.network)
    with as_config_error("model"):
        logits = module.network(torch.zeros(2, *data.shape))
        if logits.shape != (2, data.num_classes):
            raise ValueError(f"gives {tuple(logits.shape)} for two images of {data.shape}")
    with as_config_error("loss"):
        labels = torch.zeros(logits.shape) if data.augment.mixes else torch.zeros(2).long()
        loss = module.loss(logits, labels)
        if loss.ndim:
            raise ValueError("must give one number for a batch")
        loss.backward()
    build_record(cfg, Path(), data)
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
        data.open()
    network = build_network(cfg, data)
    if normalisation := getattr(network, "normalisation", None):  # of pretrained weights
        data.normalise_by(*normalisation)
    with as_config_error("loss"):
        loss = build(cfg.loss)
        if isinstance(loss, CrossEntropy):  # the counts are known once the data have been read
            loss.set_class_counts(torch.ones(data.num_classes, dtype=torch.int64))
    with as_config_error("optimizer"):
        optimizer = build(cfg.optimizer)
        build_optimizer(optimizer, network)  # raises before the data is loaded
    scheduler = build(cfg.scheduler) if cfg.scheduler else None
    return data, Classifier(network, loss, optimizer, scheduler, seed=cfg.seed)


def build_network(cfg: DictConfig, data: ImageData) -> nn.Module:
    """The network of a run, randomly initialised."""
    with as_config_error("model"), deferred_weights():
        return build(
            cfg.model, conv=build(cfg.backend), in_shape=data.shape, num_classes=data.num_classes
        )


def load_initial_weights(network: nn.Module) -> None:
    """Load pretrained weights at the start of a run, if the network has a method for it."""
    if load := getattr(network, "load_initial_weights", None):
        with as_config_error("model"):
            load()


def build_record(cfg: DictConfig, directory: Path, data: ImageData) -> EpochLog:
    """The metrics.csv and TensorBoard logger of rank 0."""
    given: Any = {"board": TensorBoard(directory), "data": data}
    with as_config_error("tensorboard"):
        shown = "tensorboard" in cfg  # not with ~tensorboard
        insights = build(cfg.tensorboard, **given) if shown else Insights.none(**given)
    return EpochLog(directory, insights)


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
    callbacks: list[lightning.Callback] = [NaNGuard(directory, data.split()[0])]
    callbacks += [record, record.insights] if record else []
    with as_config_error("trainer"):
        trainer: Trainer = build(
            cfg.trainer,
            processes=ProcessEnvironment(info),
            default_root_dir=directory,
            logger=record.tensorboard if record else False,
            callbacks=[*callbacks, *further],
        )
    config = OmegaConf.to_container(cfg, resolve=True)
    trainer.checkpoints.facts = {"config": config, "config_hash": config_hash(cfg)}
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
    warnings.filterwarnings("ignore", ".*GPU available but not used.*")
    warnings.filterwarnings("ignore", ".*number of training batches .* smaller than the logging.*")
    warnings.filterwarnings("ignore", ".*ended before the epoch ended.*not resumable.*")
    warnings.filterwarnings("ignore", ".*LeafSpec.*")
    warnings.filterwarnings("ignore", ".*in eval mode at the start of training.*")
    warnings.filterwarnings("ignore", "Profiler won't be using warmup")
    warnings.filterwarnings("ignore", ".*`srun` command is available .* but is not used.*")
    # Metrics are summed over the ranks already.
    warnings.filterwarnings("ignore", ".*sync_dist=True.*")


def this_process(cfg: DictConfig, launched: ProcessInfo | None) -> ProcessInfo:
    """This process among those that train the run together: rank 0, or as a launcher says."""
    nodes = cfg.trainer.get("num_nodes", 1)
    first = ProcessInfo(world_size=cfg.trainer.get("devices", 1) * nodes, nodes=nodes)
    return replace(launched or first, timeout=cfg.trainer.get("timeout", TIMEOUT))


def fit_and_test(
    trainer: Trainer, data: ImageData, module: Classifier, checkpoint: Path | None
) -> None:
    """Train on this rank's share of every batch, then test the chosen weights once."""
    if isinstance(module.loss, CrossEntropy):
        module.loss.set_class_counts(data.class_counts())
    device, info = trainer.strategy.root_device, trainer.info
    share = {"rank": info.rank, "world": info.world_size}
    loaders = data.train_loader(module.seed, device, **share), data.val_loader(device, **share)
    # Lightning's rule for overfit_batches, which it applies to PyTorch's DataLoader only.
    loaders[0].shuffle = not trainer.overfit_batches  # type: ignore[attr-defined]
    with interruption.answering("note"):
        trainer.fit(module, *loaders, ckpt_path=checkpoint, weights_only=True)
    interruption.check()
    best = trainer.tested
    module.load_state_dict(best["state_dict"] if best else trainer.checkpoints.weights)
    with interruption.answering("raise"):  # only the test is lost, which is repeated on resume
        trainer.test(module, data.test_loader(device, **share), verbose=False)
    interruption.check()


def spawned_rank(index: int, info: ProcessInfo) -> None:
    """Entry of a worker process that rank 0 has started."""
    distributed.detach_worker()
    with contextlib.suppress(NonFiniteError):  # rank 0 raises it as well
        train_rank(replace(info, rank=index + 1, local_rank=index + 1))


def train_rank(info: ProcessInfo) -> None:
    """On ranks 1 and up: receive the work of rank 0 and train, without output.

    Raises ProcessLost, NonFiniteError or what training raises. After a signal the process exits
    with 128 + signal.
    """
    logging.disable()
    interruption.quiet = True
    try:
        with watching("leave"), distributed.connection_errors(info):
            store = distributed.connect(info)
            if (work := distributed.receive_work(info, store)) is None:
                return
            cfg, directory = OmegaConf.create(work["config"]), Path(work["directory"])
            info = this_process(cfg, info)
            checkpoint = Path(work["checkpoint"]) if work["checkpoint"] else None
            with distributed.share_cores(info):
                data, module = build_run(cfg)
                data.prepare()
                trainer = build_trainer(cfg, info, directory, data, module)
                store.set(f"ready/{info.rank}", "")
                with distributed.process_group(info, store, trainer.strategy.root_device):
                    fit_and_test(trainer, data, module, checkpoint)
    except Interrupted as error:
        os._exit(error.exit_code)
