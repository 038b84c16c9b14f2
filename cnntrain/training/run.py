"""One run, from a config to a result."""

import io
import logging
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
from omegaconf import DictConfig
from rich.console import Console

from cnntrain.config import blame, build, config_hash
from cnntrain.models import layer_table
from cnntrain.training.classifier import Classifier
from cnntrain.training.record import METRICS, Record, TensorBoard
from cnntrain.training.run_directory import RunDirectory

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Result:
    """How a run ended. `metrics` are losses in nats and accuracies from 0 to 1, as logged."""

    metrics: dict[str, float]
    directory: Path
    seconds: float  # in all
    images_per_second: float  # training images by the time that fitting took, validation included


def train(cfg: DictConfig, directory: Path) -> Result:
    """Train, validate every epoch, test once, and leave the whole record in `directory`.

    Raises ConfigError if the config cannot be built or the directory holds another run.
    """
    started = time.perf_counter()
    _quieten_lightning()
    lightning.seed_everything(cfg.seed, verbose=False)
    with blame("data"):
        data = build(cfg.data)
    with blame("model"):
        network = build(
            cfg.model, conv=build(cfg.backend), in_shape=data.shape, num_classes=data.num_classes
        )
    with blame("loss"):
        loss = build(cfg.loss)
    with blame("optimizer"):
        optimizer = build(cfg.optimizer)
        optimizer(params=network.parameters())  # refuses now what it would refuse after the data
    scheduler = build(cfg.scheduler) if cfg.scheduler else None
    module = Classifier(network, loss, optimizer, scheduler, seed=cfg.seed)

    run = RunDirectory(directory, cfg)
    facts: dict[str, Any] = {"config_hash": config_hash(cfg), "seed": cfg.seed}
    run.write_result("running", **facts)
    try:
        data.prepare()
        tensorboard = TensorBoard(directory)
        record = Record(directory, tensorboard)
        with blame("trainer"):
            trainer = build(
                cfg.trainer,
                default_root_dir=directory,
                logger=tensorboard,
                callbacks=[record],
            )
        device = trainer.strategy.root_device
        text = io.StringIO()
        Console(file=text, width=100).print(layer_table(network, data.shape))
        log.info(text.getvalue().strip("\n"))
        if trainer.compile_network:
            network.compile()

        tensorboard.begin(cfg)
        fitting = time.perf_counter()
        trainer.fit(module, data.train_loader(cfg.seed, device), data.val_loader(device))
        speed = record.images / (time.perf_counter() - fitting)
        trainer.test(
            module, data.test_loader(device), ckpt_path=trainer.chosen_checkpoint, verbose=False
        )
        test = module.tallies["test"].metrics("test")
        tensorboard.log_metrics(test, record.epochs[-1]["epoch"])
        tensorboard.end()
    except (KeyboardInterrupt, SystemExit):  # Lightning exits upon the first
        run.write_result("interrupted", **facts)
        raise KeyboardInterrupt from None
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".split("\n")[0]
        run.write_result("failed", **facts, error=reason)
        raise

    chosen = record.chosen(trainer)
    metrics = {name: chosen[name] for name in METRICS if name in chosen} | test
    result = Result(metrics, directory, time.perf_counter() - started, speed)
    timings = {"seconds": result.seconds, "images_per_second": speed}
    run.write_result(
        "completed",
        **facts,
        metrics=metrics,
        epochs=len(record.epochs),
        tested_epoch=chosen["epoch"],
        timings=timings,
    )
    return result


def _quieten_lightning() -> None:
    """Leave out what Lightning says of itself, and warnings about what is meant to be so."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*Checkpoint directory .* exists and is not empty.*")
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*GPU available but not used.*")
    warnings.filterwarnings("ignore", ".*number of training batches .* smaller than the logging.*")
    warnings.filterwarnings("ignore", ".*LeafSpec.*")
