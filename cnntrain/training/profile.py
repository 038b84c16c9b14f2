"""Profiling of training steps with torch.profiler: a trace and a table of operators."""

import logging
import os
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from cnntrain.models.introspection import leaf_modules

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
        self.hooks: list[Any] = []
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
        )
        self.hooks = _record_layers(module.network)
        self.profiler.start()

    def on_train_batch_end(self, *_: Any) -> None:
        if self.profiler is not None:
            self.left -= 1
            self.profiler.step()
            if self.done:
                self._stop()

    def on_train_end(self, *_: Any) -> None:
        if not self.done:
            log.warning("profile: no epoch had enough batches left")

    def on_exception(self, *_: Any) -> None:
        if self.profiler is not None:
            self._stop()

    def _stop(self) -> None:
        assert self.profiler is not None
        self.profiler.stop()
        self.profiler = None
        for hook in self.hooks:
            hook.remove()

    def _write(self, profiler: profile) -> None:
        if self.left:
            return  # stopped by an exception
        self.done = True
        self.folder.mkdir(exist_ok=True)
        profiler.export_chrome_trace(str(self.folder / "trace.json"))
        table = profiler.key_averages().table(sort_by=self.time, row_limit=100)
        (self.folder / "operators.txt").write_text(table, encoding="utf-8")
        log.info(f"profile in {os.path.relpath(self.folder)}: trace.json, operators.txt")


def _record_layers(network: nn.Module) -> list[Any]:
    """Hooks that record the forward of every layer under its name."""
    running: dict[nn.Module, record_function] = {}

    def enter(layer: nn.Module, _: Any) -> None:
        running[layer] = record_function(f"{names[layer]} {type(layer).__name__}")
        running[layer].__enter__()

    def leave(layer: nn.Module, _: Any, __: Any) -> None:
        running.pop(layer).__exit__(None, None, None)

    names = leaf_modules(network)
    before = [layer.register_forward_pre_hook(enter) for layer in names]
    return before + [layer.register_forward_hook(leave) for layer in names]
