"""Checkpoint callback for bitwise resume, and the moving average of the weights."""

import time
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import CheckpointIO
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from cnntrain.interruption import Interrupted, interruption
from cnntrain.metric_names import higher_is_better
from cnntrain.training.checkpoint_file import BEST, LAST, PREVIOUS, Content, read, write
from cnntrain.training.distributed import any_stop
from cnntrain.training.lightning_compat import set_progress
from cnntrain.training.run_directory import conditions


class Checkpoints(Checkpoint):
    """Writes last.ckpt, from which a run resumes bitwise, and best.ckpt with the best weights only.

    last.ckpt is written at the given intervals, after an epoch that is the best so far, at the end
    and on a signal; the one before is kept as previous.ckpt. It contains the best weights, too, so
    that a resume needs no other file. `monitor` is the metric that decides what is best, such as
    "val/acc". In a distributed run, rank 0 writes.

    Attributes:
        facts: Further content, set before fitting.
        best: Epoch, value and state_dict of the best epoch.
        weights: The state_dict as last saved, of the average if there is one.
    """

    def __init__(
        self,
        folder: Path,
        monitor: str,
        average: "EMA | None",
        *,
        every_n_epochs: int,
        every_n_steps: int | None,
        every_n_minutes: float | None,
    ):
        self.folder, self.monitor, self.average = folder, monitor, average
        self.every_n_epochs, self.every_n_steps = every_n_epochs, every_n_steps
        self.every_n_minutes = every_n_minutes
        self.facts: Content = {}
        self.best: dict[str, Any] | None = None
        self.weights: dict[str, Tensor] = {}
        self.should_stop = False  # by early stopping, before the run was resumed
        self.better = False  # the last epoch is the best
        self.step = 0  # the last optimizer step
        self.epoch, self.batch = 0, 0  # of the next batch

    def on_load_checkpoint(self, trainer: Any, module: Any, checkpoint: Content) -> None:
        self.batch, self.should_stop = checkpoint["position"]["batch"], checkpoint["should_stop"]
        self.best, self.weights = checkpoint["best"], checkpoint["state_dict"]
        if self.best and trainer.is_global_zero:
            self._write_best()  # the file may be missing, damaged or newer than this checkpoint

    def on_train_start(self, trainer: Any, module: Any) -> None:
        interruption.install()  # Lightning has just replaced the handler of SIGTERM
        self.saved = time.monotonic()
        self.step, self.epoch = trainer.global_step, trainer.current_epoch
        if self.batch < trainer.num_training_batches:  # else only the validation is left
            trainer.train_dataloader.start_at(self.batch)
        trainer.should_stop = self.should_stop

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            return  # accumulated gradients are not saved
        self.step, self.batch = trainer.global_step, trainer.fit_loop.batch_idx + 1
        minutes = (time.monotonic() - self.saved) / 60
        due = self.every_n_steps is not None and self.step % self.every_n_steps == 0
        due |= self.every_n_minutes is not None and minutes >= self.every_n_minutes
        save, signum = any_stop(due)
        if save or signum is not None:
            self._save(trainer, signum)

    def on_validation_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        signum = any_stop(False)[1]
        if signum is not None:
            if self.average is not None:  # undo the swap for validation
                self.average.on_validation_epoch_end(trainer, module)
            self._save(trainer, signum)  # a resume repeats the validation

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        stage = self.monitor.partition("/")[0]
        value = module.totals[stage].metrics(stage)[self.monitor]
        sign = 1 if higher_is_better(self.monitor) else -1
        self.better = self.best is None or sign * value > sign * self.best["value"]
        if self.better:
            self.best = {"epoch": trainer.current_epoch, "value": value}
        self.epoch, self.batch = trainer.current_epoch + 1, 0
        ended = trainer.should_stop or self.epoch == trainer.max_epochs
        signum = any_stop(False)[1]
        save = self.epoch % self.every_n_epochs == 0 or ended or signum is not None
        if save or self.better:
            self._save(trainer, signum)

    def on_save_checkpoint(self, trainer: Any, module: Any, checkpoint: Content) -> None:
        set_progress(checkpoint, trainer, self.epoch, self.batch)
        self.weights = {name: t.detach().clone() for name, t in checkpoint["state_dict"].items()}
        if self.better and self.best:
            self.best["state_dict"] = self.weights
        checkpoint.update(
            self.facts,
            position={"epoch": self.epoch, "batch": self.batch},
            should_stop=trainer.should_stop,
            best=self.best,
            conditions=conditions(),
        )

    def _save(self, trainer: lightning.Trainer, signum: int | None) -> None:
        """Raises Interrupted at the end if any rank has received a signal, `signum`."""
        first = not (self.folder / LAST).exists()
        trainer.save_checkpoint(self.folder / LAST)
        if trainer.is_global_zero:
            if first:
                read(self.folder / LAST)  # raises now for a state that could not be loaded
            if self.better:
                self._write_best()
        self.saved = time.monotonic()
        self.better = False
        if signum is not None:
            interruption.received = signum
            raise Interrupted(signum)

    def _write_best(self) -> None:
        assert self.best
        write(self.folder / BEST, {**self.facts, **self.best})


class CheckpointFiles(CheckpointIO):
    """Lightning's access to checkpoint files."""

    def save_checkpoint(self, checkpoint: Content, path: Any, storage_options: Any = None) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, checkpoint, keep=path.with_name(PREVIOUS))

    def load_checkpoint(self, path: Any, *_: Any, **__: Any) -> Content:
        return read(Path(path))

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)


class EMA(lightning.Callback):
    """Exponential moving average of weights and buffers, updated after every optimizer step.

    It replaces them in validation, in the test and as `state_dict` of checkpoints. Lightning's
    `WeightAveraging` synchronises with the GPU at every step.
    """

    def __init__(self, decay: float):
        self.update = get_ema_multi_avg_fn(decay)
        self.average: dict[str, Tensor] = {}

    def on_load_checkpoint(self, trainer: Any, module: Any, checkpoint: Content) -> None:
        self.average = checkpoint["state_dict"]
        module.load_state_dict(checkpoint["current_model_state"])

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.step, self.current = trainer.global_step, module.state_dict()
        before = self.average or self.current
        self.average = {n: before[n].to(t.device, copy=True) for n, t in self.current.items()}
        self.floats = [n for n, t in self.current.items() if t.is_floating_point()]

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            return  # gradients are being accumulated
        first, self.step = self.step == 0, trainer.global_step
        for name in self.current if first else self.current.keys() - self.floats:
            self.average[name].copy_(self.current[name])
        averages, values = ([t[n] for n in self.floats] for t in (self.average, self.current))
        self.update(averages, values, self.step)

    def on_validation_epoch_start(self, trainer: Any, module: Any) -> None:
        """Swap weights and average."""
        for name, current in self.current.items():
            swapped = current.clone()
            current.copy_(self.average[name])
            self.average[name].copy_(swapped)

    on_validation_epoch_end = on_validation_epoch_start  # type: ignore[assignment]

    def on_save_checkpoint(self, trainer: Any, module: Any, checkpoint: Content) -> None:
        checkpoint["current_model_state"] = checkpoint["state_dict"]
        checkpoint["state_dict"] = self.average


def shape_differences(saved: Content, wanted: Content) -> list[str]:
    """Why a state_dict cannot be loaded, a phrase per tensor, with shapes as 1x28x28."""

    def shape(state: Content, name: str) -> str:
        return "x".join(map(str, state[name].shape)) or "a number" if name in state else "nothing"

    names = dict.fromkeys([*wanted, *saved])
    shapes = [(name, shape(saved, name), shape(wanted, name)) for name in names]
    return [
        f"{name} is {there} there and {here} here" for name, there, here in shapes if there != here
    ]
