"""Where the time of a training step goes: a trace for the browser and a table of operators."""

import logging
import os
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from cnntrain.models.introspection import leaf_modules

log = logging.getLogger(__name__)

WAIT, WARMUP, STEPS = 3, 2, 5  # batches that are let go by, that warm up, that are recorded
ROWS = 12  # operators in the table
FOLDER = "profile"


class Profile(lightning.Callback):
    """Records five training batches of this process with PyTorch's profiler, or all of an epoch
    that has fewer.

    Leaves `directory`/profile/trace.json, for https://ui.perfetto.dev or chrome://tracing, with
    every layer's forward under its name, and operators.txt, by the time spent in each operator
    itself; that table is logged, too. What is trained stays the same, bit for bit.
    """

    def __init__(self, directory: str | os.PathLike[str]):
        self.folder = Path(directory, FOLDER)
        self.profiler: profile | None = None
        self.hooks: list[Any] = []
        self.done = False

    def on_train_batch_start(
        self, trainer: lightning.Trainer, module: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.done or self.profiler:
            return
        # All in one epoch: a validation is not to be taken for a part of a training step.
        there = int(trainer.num_training_batches)
        self.steps = min(STEPS, there)
        warmup = min(WARMUP, there - self.steps)
        wait = min(WAIT, there - self.steps - warmup)
        enough = there - batch_idx >= wait + warmup + self.steps
        cold = wait == 0 and trainer.current_epoch == 0 and trainer.max_epochs != 1
        if cold or not enough:
            return
        activities = [ProfilerActivity.CPU]
        self.by = "self_cpu_time_total"
        if module.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
            self.by = "self_cuda_time_total"
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Profiler won't be using warmup")  # too few for it
            plan = schedule(wait=wait, warmup=warmup, active=self.steps, repeat=1)
        self.profiler = profile(activities=activities, schedule=plan, on_trace_ready=self._write)
        self.left = wait + warmup + self.steps
        self.hooks = _named(module.network)
        self.profiler.start()

    def on_train_batch_end(self, *_: Any) -> None:
        if self.profiler is not None:
            self.left -= 1
            self.profiler.step()
            if self.done:
                self._end()

    def on_train_end(self, *_: Any) -> None:
        if not self.done:
            log.warning("profile: no epoch was left with batches enough")

    def on_exception(self, *_: Any) -> None:
        if self.profiler is not None:
            self._end()

    def _end(self) -> None:
        assert self.profiler is not None
        self.profiler.stop()
        self.profiler = None
        for hook in self.hooks:
            hook.remove()

    def _write(self, profiler: profile) -> None:
        if self.left:
            return  # it was ended before its time
        self.done = True
        self.folder.mkdir(exist_ok=True)
        trace, table = self.folder / "trace.json", self.folder / "operators.txt"
        profiler.export_chrome_trace(str(trace))
        averages = profiler.key_averages()
        table.write_text(averages.table(sort_by=self.by, row_limit=100), encoding="utf-8")
        where, batches = os.path.relpath(self.folder), "batch" if self.steps == 1 else "batches"
        log.info(f"{self.steps} {batches}, in {where}: {trace.name}, {table.name}; most went to")
        log.info(_costliest(averages, "cuda" in self.by, self.steps))


def _named(network: nn.Module) -> list[Any]:
    """Let every layer's forward be seen under its name; hooks to be removed."""
    open_: dict[nn.Module, record_function] = {}

    def enter(layer: nn.Module, _: Any) -> None:
        open_[layer] = record_function(f"{names[layer]} {type(layer).__name__}")
        open_[layer].__enter__()

    def leave(layer: nn.Module, _: Any, __: Any) -> None:
        open_.pop(layer).__exit__(None, None, None)

    names = leaf_modules(network)
    return [
        hook
        for layer in names
        for hook in (layer.register_forward_pre_hook(enter), layer.register_forward_hook(leave))
    ]


def _costliest(averages: Any, cuda: bool, steps: int) -> str:
    """The operators that take most of the time, a line each: share, ms a batch, calls a batch."""
    time = "self_device_time_total" if cuda else "self_cpu_time_total"
    named = ("ProfilerStep", "Optimizer.step#")  # which have operators within
    averages = [row for row in averages if not row.key.startswith(named)]
    rows = sorted(averages, key=lambda row: getattr(row, time), reverse=True)
    total = sum(getattr(row, time) for row in rows) or 1
    lines = [f"  {'share':>6} {'ms':>8} {'calls':>6}   operator"]
    for row in rows[:ROWS]:
        own, calls = getattr(row, time), row.count / steps
        lines.append(f"  {own / total:6.1%} {own / 1000 / steps:8.3f} {calls:6.1f}   {row.key}")
    return "\n".join(lines)
