"""Lightning's trainer with the options that a run has."""

from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Literal

import lightning.pytorch as lightning
import torch
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.strategies import DDPStrategy
from pydantic import Field, PositiveFloat, PositiveInt

from cnntrain.metric_names import Monitored, higher_is_better
from cnntrain.process_info import TIMEOUT, ProcessInfo
from cnntrain.training.checkpoints import EMA, CheckpointFiles, Checkpoints
from cnntrain.training.epoch_log import ProgressBar

Devices = Annotated[
    int,
    Field(
        gt=0,
        description="the number of processes, such as 1 or 2; to choose GPUs, set "
        "CUDA_VISIBLE_DEVICES=0,1 in the environment",
    ),
]
Decay = Annotated[float, Field(gt=0, lt=1)]
Precision = Literal[32, "32", "32-true", "bf16-mixed", "16-mixed"]


class ProcessEnvironment(LightningEnvironment):
    """Rank of a process that exists already, for Lightning."""

    creates_processes_externally = True

    def __init__(self, info: ProcessInfo):
        super().__init__()
        self.info = info

    def local_rank(self) -> int:
        return self.info.local_rank

    def node_rank(self) -> int:
        return self.info.rank // self.info.devices


class Trainer(lightning.Trainer):
    """`lightning.Trainer` with checkpoints and early stopping by one metric.

    `checkpoints/last.ckpt` and `best.ckpt` are written under `default_root_dir`.
    `lightning_options` are other arguments of Lightning's trainer, except those in
    `cnntrain.config.nodes.TRAINER_GIVEN`.

    With `devices` > 1, `processes` gives the rank of this process among those that exist already:
    the trainer starts none. A rank that does not respond within `timeout` seconds ends the run.
    """

    def __init__(
        self,
        *,
        accelerator: Literal["auto", "cpu", "gpu", "cuda", "mps"] = "auto",
        devices: Devices = 1,
        num_nodes: PositiveInt = 1,
        timeout: PositiveFloat = TIMEOUT,
        max_epochs: PositiveInt = 10,
        precision: Precision = 32,
        compile: bool = False,
        cuda_graphs: bool = False,
        channels_last: bool = False,
        deterministic: bool = False,
        gradient_clip_val: PositiveFloat | None = None,
        accumulate_grad_batches: PositiveInt = 1,
        monitor: Monitored = "val/acc",
        early_stopping: PositiveInt | None = None,
        ema: Decay | None = None,
        checkpoint_every_n_epochs: PositiveInt = 1,
        checkpoint_every_n_steps: PositiveInt | None = None,
        checkpoint_every_n_minutes: PositiveFloat | None = None,
        test_checkpoint: Literal["best", "last"] = "best",
        progress_bar: bool = True,
        log_every_n_steps: PositiveInt = 50,
        default_root_dir: Path | None = None,
        callbacks: list[lightning.Callback] | None = None,
        processes: ProcessEnvironment | None = None,
        **lightning_options: Any,
    ):
        average = EMA(ema) if ema is not None else None
        self.checkpoints = Checkpoints(
            Path(default_root_dir or ".") / "checkpoints",
            monitor,
            average,
            every_n_epochs=checkpoint_every_n_epochs,
            every_n_steps=checkpoint_every_n_steps,
            every_n_minutes=checkpoint_every_n_minutes,
        )
        info = ProcessInfo(world_size=devices * num_nodes, nodes=num_nodes)
        processes = processes or ProcessEnvironment(info)
        self.info = info = processes.info
        own: list[lightning.Callback] = [ProgressBar()] if progress_bar and info.rank == 0 else []
        own += [*(callbacks or []), *([average] if average else [])]
        if early_stopping is not None:
            mode = "max" if higher_is_better(monitor) else "min"
            own.append(EarlyStopping(monitor, patience=early_stopping, mode=mode))
        if info.world_size > 1:
            lightning_options["strategy"] = DDPStrategy(
                cluster_environment=processes, timeout=timedelta(seconds=timeout)
            )
        self.compile_network, self.cuda_graphs = compile, cuda_graphs
        self.channels_last, self.test_checkpoint = channels_last, test_checkpoint
        super().__init__(
            accelerator=accelerator,
            devices=devices,
            num_nodes=num_nodes,
            max_epochs=max_epochs,
            precision=precision,
            deterministic=deterministic,
            gradient_clip_val=gradient_clip_val,
            accumulate_grad_batches=accumulate_grad_batches,
            log_every_n_steps=log_every_n_steps,
            default_root_dir=default_root_dir,
            callbacks=[*own, self.checkpoints],
            plugins=[CheckpointFiles()],
            # The run prints its own, and one batch has been tried before.
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            **lightning_options,
        )

    @property
    def tested(self) -> dict[str, Any] | None:
        """The best epoch if its weights are to be tested; None: the last one."""
        return self.checkpoints.best if self.test_checkpoint == "best" else None


def device_text(trainer: lightning.Trainer) -> str:
    """Device of a run: `cpu, 2 threads`, `2 x cuda (NVIDIA H200)`, `mps`."""
    device, world = trainer.strategy.root_device, trainer.world_size
    count = f"{world} x " if world > 1 else ""
    if device.type == "cuda":
        return f"{count}cuda ({torch.cuda.get_device_name(device)})"
    threads = torch.get_num_threads()
    each = f", {threads} thread{'s' * (threads > 1)}{' each' * (world > 1)}"
    return f"{count}{device.type}{each if device.type == 'cpu' else ''}"
