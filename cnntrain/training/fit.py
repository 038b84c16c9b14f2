"""Fit and test on each rank of a run."""

import contextlib
import logging
import os
from dataclasses import replace
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from cnntrain.data import ImageData
from cnntrain.interruption import Interrupted, interruption, watching
from cnntrain.process_info import TIMEOUT, ProcessInfo
from cnntrain.training.building import build_run, build_trainer
from cnntrain.training.classifier import Classifier
from cnntrain.training.distributed import connect, process_group, share_cores
from cnntrain.training.nan_guard import NonFiniteError
from cnntrain.training.trainer import Trainer
from cnntrain.training.workers import connection_errors, detach_worker, receive_work


def fit_and_test(
    trainer: Trainer,
    info: ProcessInfo,
    cfg: DictConfig,
    data: ImageData,
    module: Classifier,
    checkpoint: Path | None,
) -> None:
    """Train on this rank's share of every batch, then test the chosen weights once."""
    device, share = trainer.strategy.root_device, {"rank": info.rank, "world": info.world_size}
    loaders = data.train_loader(cfg.seed, device, **share), data.val_loader(device, **share)
    # Lightning's rule for overfit_batches, which it applies to PyTorch's DataLoader alone.
    loaders[0].shuffle = not trainer.overfit_batches  # type: ignore[attr-defined]
    with interruption.answering("note"):
        trainer.fit(module, *loaders, ckpt_path=checkpoint, weights_only=True)
    interruption.check()
    module.load_state_dict(trainer.chosen_weights)
    with interruption.answering("raise"):  # only the test is lost, which is repeated on resume
        trainer.test(module, data.test_loader(device, **share), verbose=False)
    interruption.check()


def spawned_rank(index: int, info: ProcessInfo) -> None:
    """Entry of a worker process that rank 0 has started."""
    detach_worker()
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
        with watching("leave"), connection_errors(info):
            store = connect(info)
            if (work := receive_work(info, store)) is None:
                return
            cfg, directory = OmegaConf.create(work["config"]), Path(work["directory"])
            info = replace(info, timeout=cfg.trainer.get("timeout", TIMEOUT))
            checkpoint = Path(work["checkpoint"]) if work["checkpoint"] else None
            with share_cores(info):
                data, module = build_run(cfg)
                data.prepare()
                trainer = build_trainer(cfg, info, directory, data, module)
                store.set(f"ready/{info.rank}", "")
                with process_group(info, store, trainer.strategy.root_device):
                    fit_and_test(trainer, info, cfg, data, module, checkpoint)
    except Interrupted as error:
        os._exit(error.exit_code)
