"""When a run is saved, what of it, and how it goes on from there."""

import random
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import numpy as np
import torch
from lightning.pytorch.callbacks import Checkpoint, WeightAveraging
from lightning.pytorch.plugins.io import CheckpointIO
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from cnntrain.interruption import Interrupted, interruption
from cnntrain.training.checkpoint_file import BEST, LAST, PREVIOUS, Content, read, write
from cnntrain.training.distributed import any_stop, is_single_process
from cnntrain.training.run_directory import conditions


class Checkpoints(Checkpoint):
    """Writes last.ckpt, from which a run goes on as if it had never stopped, and best.ckpt.

    last.ckpt is written every so many epochs, steps or minutes, when an epoch is the best so far,
    at the end, and when a signal asks to stop; the one before it stays as previous.ckpt. It holds
    the best weights so far, too, so that it alone decides how the run ends. best.ckpt has only
    these, for use elsewhere. With several processes, rank 0 writes what all have agreed to save.
    """

    def __init__(
        self,
        folder: Path,
        monitor: str,
        average: "Average | None" = None,
        *,
        every_n_epochs: int = 1,
        every_n_steps: int | None = None,
        every_n_minutes: float | None = None,
    ):
        self.folder, self.monitor, self.average = folder, monitor, average
        self.every_n_epochs, self.every_n_steps = every_n_epochs, every_n_steps
        self.every_n_minutes = every_n_minutes
        self.facts: Content = {}  # what else is to be written, of the run as a whole
        self.best: dict[str, Any] | None = None  # epoch, value and state_dict
        self.weights: dict[str, Any] = {}  # those that a run evaluates, as last saved
        self.resumed: Content | None = None
        self.better = False  # the epoch just validated is the best
        self.step = 0  # the last optimizer step seen
        self.epoch, self.batch = 0, 0  # where the next step is

    def on_load_checkpoint(self, trainer: Any, module: Any, checkpoint: Content) -> None:
        self.resumed, self.best = checkpoint, checkpoint["best"]
        self.weights = checkpoint["state_dict"]
        if self.best and trainer.is_global_zero:
            self._write_best()  # the file may be missing, damaged, or ahead of this checkpoint

    def on_train_start(self, trainer: Any, module: Any) -> None:
        interruption.install()  # Lightning has just put its own handler of SIGTERM in front
        self.saved = time.monotonic()
        self.step, self.epoch = trainer.global_step, trainer.current_epoch
        if self.resumed:
            self.batch = self.resumed["position"]["batch"]
            if self.batch < trainer.num_training_batches:  # else only validation is left
                trainer.train_dataloader.start_at(self.batch)
            trainer.should_stop = self.resumed["should_stop"]  # early stopping has said so
            restore_generators(self.resumed["generators"])
            self.resumed = None

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self.step:
            return  # gradients are being accumulated: there is nothing to go on from
        self.step, self.batch = trainer.global_step, batch_idx + 1
        minutes = (time.monotonic() - self.saved) / 60
        due = self.every_n_steps is not None and self.step % self.every_n_steps == 0
        due |= self.every_n_minutes is not None and minutes >= self.every_n_minutes
        save, signum = any_stop(due)
        if save or signum is not None:
            self._save(trainer)
        _check(signum)

    def on_validation_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        signum = any_stop(False)[1]
        if signum is not None and not trainer.sanity_checking:
            if self.average is not None:  # validation has put the averaged weights in their place
                self.average.on_validation_epoch_end(trainer, module)
            self._save(trainer)  # validation will begin anew
            _check(signum)

    def on_train_epoch_end(self, trainer: lightning.Trainer, module: Any) -> None:
        stage = self.monitor.partition("/")[0]
        value = module.totals[stage].metrics(stage)[self.monitor]
        sign = 1 if self.monitor.endswith("acc") else -1
        self.better = self.best is None or sign * value > sign * self.best["value"]
        if self.better:
            self.best = {"epoch": trainer.current_epoch, "value": value}
        self.epoch, self.batch = trainer.current_epoch + 1, 0
        ended = trainer.should_stop or self.epoch == trainer.max_epochs
        signum = any_stop(False)[1]
        save = self.epoch % self.every_n_epochs == 0 or ended or signum is not None
        if save or self.better:
            self._save(trainer)
        _check(signum)

    def on_save_checkpoint(self, trainer: Any, module: Any, checkpoint: Content) -> None:
        position = {"epoch": self.epoch, "batch": self.batch}
        loops = checkpoint["loops"]["fit_loop"]
        _set_progress(loops, trainer.num_training_batches, trainer.global_step, **position)
        self.weights = {name: t.detach().clone() for name, t in checkpoint["state_dict"].items()}
        if self.better and self.best:
            self.best["state_dict"] = self.weights
        checkpoint.update(
            self.facts,
            position=position,
            should_stop=trainer.should_stop,
            generators=generators(),
            best=self.best,
            conditions=conditions(),
        )

    def _save(self, trainer: lightning.Trainer) -> None:
        first = not (self.folder / LAST).exists()
        trainer.save_checkpoint(self.folder / LAST)
        if trainer.is_global_zero:
            if first:
                read(self.folder / LAST)  # says so now if a state is of a kind that is not loaded
            if self.better:
                self._write_best()
        self.saved = time.monotonic()
        self.better = False

    def _write_best(self) -> None:
        assert self.best
        write(self.folder / BEST, {**self.facts, **self.best, "conditions": conditions()})


def _check(signum: int | None) -> None:
    """Raise Interrupted if a signal has come; with several processes, if all know of it."""
    if is_single_process():
        interruption.check()
    elif signum is not None:
        interruption.received = signum
        raise Interrupted(signum)


class CheckpointFiles(CheckpointIO):
    """Lightning's way to the files."""

    def save_checkpoint(self, checkpoint: Content, path: Any, storage_options: Any = None) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, checkpoint, keep=path.with_name(PREVIOUS))

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = None
    ) -> Content:
        return read(Path(path))

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)


class Average(WeightAveraging):
    """An exponential moving average of all weights and buffers, updated after every step.

    It is what is validated, tested and called the run's weights; `decay` is the share that stays.
    Lightning's callback swaps and saves it; the update is one kernel, for which nobody waits.
    """

    def __init__(self, decay: float):
        super().__init__(use_buffers=True)
        self.update = get_ema_multi_avg_fn(decay)

    def on_train_start(self, trainer: Any, module: Any) -> None:
        assert self._average_model is not None
        # Lightning makes it before the network is on its device.
        average = self._average_model.to(module.device).module
        theirs = [*module.parameters(), *module.buffers()]
        pairs = zip([*average.parameters(), *average.buffers()], theirs, strict=True)
        self.averaged: list[tuple[Tensor, Tensor]] = []
        self.copied: list[tuple[Tensor, Tensor]] = []  # counts, of which there is no average
        for own, their in pairs:
            fraction = own.is_floating_point() or own.is_complex()
            (self.averaged if fraction else self.copied).append((own, their))

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        step = trainer.global_step
        if step == self._latest_update_step:
            return  # gradients are being accumulated
        if self._latest_update_step:
            own, theirs = map(list, zip(*self.averaged, strict=True))
            self.update(own, theirs, None)
        for kept, seen in self.copied if self._latest_update_step else self.averaged + self.copied:
            kept.copy_(seen)
        self._latest_update_step = step


def generators() -> Content:
    """The states of Python's, NumPy's and PyTorch's generators, as plain containers."""
    version, numbers, gauss = random.getstate()
    name, keys, *rest = np.random.get_state()  # noqa: NPY002
    return {
        "python": [version, list(numbers), gauss],
        "numpy": [name, torch.from_numpy(np.array(keys, dtype=np.int64)), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }


def restore_generators(states: Content) -> None:
    """Let all generators go on from `states`; those of CUDA where there are as many devices."""
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(states["torch"])
    if states["cuda"] and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])


def _set_progress(loops: Content, batches: int, steps: int, epoch: int, batch: int) -> None:
    """Write into Lightning's loops how far a run is, as they would say at the end of a batch.

    A hook is called before they count what it is called for. Left so, they guess at what was
    done, and after a resume within an epoch validate or count once too often.
    """
    within = batch > 0  # else between two epochs
    done = {"ready": epoch, "started": epoch, "processed": epoch, "completed": epoch}
    begun = {**done, "ready": epoch + 1, "started": epoch + 1} if within else done
    loops["epoch_progress"] = {"total": begun, "current": dict(begun)}
    loops["epoch_loop.state_dict"] = {"_batches_that_stepped": steps}
    total = epoch * batches + batch
    loops["epoch_loop.batch_progress"] = {
        "total": dict.fromkeys(done, total),
        "current": dict.fromkeys(done, batch),
        "is_last_batch": batch == batches,
    }
    # What Lightning takes for "in the middle of a validation": it is begun anew.
    owed = int(batch == batches)
    validation = {"ready": owed, "started": owed, "processed": 0, "completed": 0}
    loops["epoch_loop.val_loop.batch_progress"] = {
        "total": validation,
        "current": dict.fromkeys(done, 0),
        "is_last_batch": False,
    }


def shape_differences(saved: Content, wanted: Content) -> list[str]:
    """What keeps weights from being loaded, a phrase for each tensor: (C, H, W) as 1x28x28."""

    def shape(state: Content, name: str) -> str:
        return "x".join(map(str, state[name].shape)) or "a number" if name in state else "nothing"

    return [
        f"{name} is {shape(saved, name)} there and {shape(wanted, name)} here"
        for name in [*wanted, *(name for name in saved if name not in wanted)]
        if shape(saved, name) != shape(wanted, name)
    ]
