"""Lightning's training step, without what it does for those who ask for more than a plain one."""

import inspect
from collections.abc import Callable
from typing import Any

import lightning.pytorch as lightning
from lightning.pytorch.loops.optimization.automatic import _AutomaticOptimization
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.optim import Optimizer

HOOKS = [
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
]


class Steps(_AutomaticOptimization):
    """The loss of a batch, its gradients and the update, and all hooks in between.

    Lightning hands them down as closures through a dozen layers, each of which may be another for
    other strategies and precisions, and asks all callbacks for all hooks. Kernels leave little of
    Python in a core's caches, so that with a small network this takes some percent of a step. Where
    it comes to nothing (one process, float32, no accumulation, clipping or profiler) the same is
    done here, in the same order; in all other cases by Lightning.
    """

    def run(self, optimizer: Optimizer, batch_idx: int, kwargs: Any) -> dict[str, Any]:
        if batch_idx == 0 or not hasattr(self, "hooks"):
            self.plain, self.hooks = self._plain(optimizer), self._hooks()
        if not self.plain:
            return super().run(optimizer, batch_idx, kwargs)
        module: Any = self.trainer.lightning_module
        progress = self.optim_progress.optimizer
        progress.step.increment_ready()
        loss = module.training_step(*kwargs.values())
        progress.zero_grad.increment_ready()
        self._call("on_before_zero_grad", optimizer)
        progress.zero_grad.increment_started()
        module.optimizer_zero_grad(self.trainer.current_epoch, batch_idx, optimizer)
        progress.zero_grad.increment_completed()
        self._call("on_before_backward", loss)
        module.backward(loss)
        self._call("on_after_backward")
        self._call("on_before_optimizer_step", optimizer)
        optimizer.step()
        progress.step.increment_completed()
        return {"loss": loss.detach()}

    def _plain(self, optimizer: Optimizer) -> bool:
        trainer: Any = self.trainer
        closure = inspect.signature(optimizer.step).parameters.get("closure")
        return (
            type(trainer.strategy) is SingleDeviceStrategy
            and type(trainer.precision_plugin) is Precision
            and isinstance(trainer.profiler, PassThroughProfiler)
            and trainer.accumulate_grad_batches == 1
            and not trainer.gradient_clip_val
            and (closure is None or closure.default is None)  # else it computes losses as it likes
        )

    def _hooks(self) -> dict[str, list[Callable[..., None]]]:
        """Those that do anything, the module's after the callbacks'."""
        there: dict[str, list[Callable[..., None]]] = {}
        callbacks: list[lightning.Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        for name in HOOKS:
            hooks = [getattr(callback, name) for callback in callbacks]
            there[name] = [hook for hook in hooks if _does(hook, getattr(lightning.Callback, name))]
            own = getattr(self.trainer.lightning_module, name)
            if _does(own, getattr(lightning.LightningModule, name)):
                there[name].append(lambda trainer, module, *arguments, own=own: own(*arguments))
        return there

    def _call(self, name: str, *arguments: Any) -> None:
        trainer = self.trainer
        module: Any = trainer.lightning_module
        before, module._current_fx_name = module._current_fx_name, name  # for `module.log`
        for hook in self.hooks[name]:
            hook(trainer, module, *arguments)
        module._current_fx_name = before


def _does(hook: Callable[..., None], nothing: Callable[..., None]) -> bool:
    """Whether it is another one than that of the base class, which does nothing."""
    return getattr(hook, "__func__", None) is not nothing
