"""Lightning's loop over the batches of an epoch, without what it does for other runs than ours."""

import inspect
from collections.abc import Callable
from typing import Any

import lightning.pytorch as lightning
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import SingleDeviceStrategy

CALLBACK_HOOKS = [
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
]

Hook = Callable[..., Any]


class EpochLoop(_TrainingEpochLoop):
    """Trains on a batch after the other: the loss, its gradients, the update, and all hooks.

    Lightning hands a step down as closures through a dozen layers, each of which may be another for
    other strategies and precisions, and asks all callbacks for all hooks. Kernels leave little of
    Python in a core's caches, so that with a small network this takes a tenth of a step. Where it
    comes to nothing (one process, float32, no accumulation or clipping, validation after
    the epoch) the same is done here, in the same order; in all other cases by Lightning.
    """

    def on_run_start(self, data_fetcher: Any) -> None:
        super().on_run_start(data_fetcher)
        self.plain, self.hooks = self._plain(), self._hooks()
        self.module: Any = self.trainer.lightning_module

    def advance(self, data_fetcher: Any) -> None:
        if self.restarting or not self.plain:
            super().advance(data_fetcher)
            return
        connector = self.trainer._logger_connector
        progress, number = self.batch_progress, self.batch_idx + 1
        batch, _, _ = next(data_fetcher)
        progress.is_last_batch = data_fetcher.done
        progress.increment_ready()
        connector.on_batch_start(batch)
        self._call("on_train_batch_start", batch, number)
        progress.increment_started()
        loss = self._step(batch, number)
        progress.increment_processed()
        self.update_lr_schedulers("step", update_plateau_schedulers=False)
        if self._num_ready_batches_reached():
            self.update_lr_schedulers("epoch", update_plateau_schedulers=False)
        self._call("on_train_batch_end", {"loss": loss}, batch, number)
        if any(metric.meta.on_step for metric in self._results.values()):
            connector.on_batch_end()
            progress.increment_completed()
            connector.update_train_step_metrics()
        else:  # all of it would come to nothing but this
            progress.increment_completed()
            self._results.batch = self._results.batch_size = None

    def on_advance_end(self, data_fetcher: Any) -> None:
        if self.plain and not (self.batch_progress.is_last_batch or self.trainer.should_stop):
            self._batches_that_stepped += 1
        else:
            super().on_advance_end(data_fetcher)

    def _step(self, batch: Any, number: int) -> Any:
        """The loss, detached."""
        module, optimizer = self.module, self.trainer.optimizers[0]
        progress = self.automatic_optimization.optim_progress.optimizer
        progress.step.increment_ready()
        loss = module.training_step(batch, number)
        progress.zero_grad.increment_ready()
        self._call("on_before_zero_grad", optimizer)
        progress.zero_grad.increment_started()
        module.optimizer_zero_grad(self.trainer.current_epoch, number, optimizer)
        progress.zero_grad.increment_completed()
        self._call("on_before_backward", loss)
        module.backward(loss)
        self._call("on_after_backward")
        self._call("on_before_optimizer_step", optimizer)
        optimizer.step()
        progress.step.increment_completed()
        return loss.detach()

    def _plain(self) -> bool:
        trainer: Any = self.trainer
        closure = inspect.signature(trainer.optimizers[0].step).parameters.get("closure")
        return (
            type(trainer.strategy) is SingleDeviceStrategy
            and type(trainer.precision_plugin) is Precision
            and trainer.accumulate_grad_batches == 1
            and not trainer.gradient_clip_val
            and trainer.val_check_batch == trainer.num_training_batches
            and trainer._val_check_time_interval is None
            and (closure is None or closure.default is None)  # else it computes losses as it likes
        )

    def _hooks(self) -> dict[str, list[Hook]]:
        """Those that do anything, the module's after the callbacks'."""
        there: dict[str, list[Hook]] = {}
        callbacks: list[lightning.Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        for name in CALLBACK_HOOKS:
            hooks = [getattr(callback, name) for callback in callbacks]
            there[name] = [hook for hook in hooks if _does(hook, getattr(lightning.Callback, name))]
            own = getattr(self.trainer.lightning_module, name)
            if _does(own, getattr(lightning.LightningModule, name)):
                there[name].append(lambda trainer, module, *arguments, own=own: own(*arguments))
        return there

    def _call(self, name: str, *arguments: Any) -> None:
        trainer, module = self.trainer, self.module
        before, module._current_fx_name = module._current_fx_name, name  # for `module.log`
        for hook in self.hooks[name]:
            hook(trainer, module, *arguments)
        module._current_fx_name = before


def _does(hook: Hook, nothing: Hook) -> bool:
    """Whether it is another one than that of the base class, which does nothing."""
    return getattr(hook, "__func__", None) is not nothing
