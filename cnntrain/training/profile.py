"""Profiling of training steps with torch.profiler: a trace and a table of operators."""

import logging
import os
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
from lightning.pytorch.profilers.pytorch import RegisterRecordFunction
from torch.profiler import ProfilerActivity, profile, schedule

log = logging.getLogger(__name__)

WAIT, WARMUP, STEPS = 3, 2, 5  # batches to skip, to warm up, to record


class Profile(lightning.Callback):
    """Records five training batches of this process, or all batches of a shorter epoch.

    Writes trace.json (for https://ui.perfetto.dev or chrome://tracing), with each layer's forward
    under its name, and operators.txt to `profile` in the run directory. Results of the training are
    bitwise the same.
    """

    def __init__(self, directory: str | os.PathLike[str]):
        self.folder = Path(directory, "profile")
        self.profiler: profile | None = None
        self.done = False

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if self.done or self.profiler:
            return
        # All within one epoch: a validation is no part of a training step.
        batches = int(trainer.num_training_batches)
        steps = min(STEPS, batches)
        warmup = min(WARMUP, batches - steps)
        first = min(WAIT, batches - steps - warmup)
        cold = first == 0 and trainer.current_epoch == 0 and trainer.max_epochs != 1
        if cold or batch_idx != first:
            return
        self.left, cuda = warmup + steps, module.device.type == "cuda"
        self.time = "self_device_time_total" if cuda else "self_cpu_time_total"
        self.profiler = profile(
            activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])],
            schedule=schedule(wait=0, warmup=warmup, active=steps, repeat=1),
            on_trace_ready=self._write,
            acc_events=True,  # there is one cycle; otherwise torch 2.11 warns
        )
        self.layers = RegisterRecordFunction(module.network)
        self.layers.__enter__()
        self.profiler.start()

    def on_train_batch_end(self, *_: Any) -> None:
        if self.profiler is not None:
            self.left -= 1
            self.profiler.step()
            if self.done:
                self.stop()

    def on_train_end(self, *_: Any) -> None:
        if not self.done:
            log.warning("profile: no epoch had enough batches left")

    def stop(self, *_: Any) -> None:
        if self.profiler is not None:
            self.profiler.stop()
            self.layers.__exit__(None, None, None)
            self.profiler = None

    on_exception = stop  # type: ignore[assignment]

    def _write(self, profiler: profile) -> None:
        if self.left:
            return  # stopped by an exception
        self.done = True
        self.folder.mkdir(exist_ok=True)
        profiler.export_chrome_trace(str(self.folder / "trace.json"))
        table = profiler.key_averages().table(sort_by=self.time, row_limit=100)
        (self.folder / "operators.txt").write_text(table, encoding="utf-8")
        log.info(f"profile in {os.path.relpath(self.folder)}: trace.json, operators.txt")
