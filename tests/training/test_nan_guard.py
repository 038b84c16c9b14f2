"""NaN/Inf guard: at which batch a run stops, its message, and the weights that it keeps.

`deferred` tests on the CPU the asynchronous check of CUDA, where the host sees a bad batch later.
"""

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import pytest
import torch
from torch import Tensor, nn

from cnntrain.config import build, compose
from cnntrain.training.classifier import Classifier
from cnntrain.training.losses import CrossEntropy
from cnntrain.training.nan_guard import NaNGuard, NonFiniteError

BATCH, BATCHES, EPOCHS = 20, 8, 3
both = pytest.mark.parametrize("deferred", [False, True], ids=["at once", "deferred"])


class Switch:
    """On while the network computes a given batch."""

    def __init__(self, network: nn.Module, images: Tensor):
        self.on = self.always = False
        self.images = images
        network.register_forward_pre_hook(self._look)

    def _look(self, network: nn.Module, args: tuple[Tensor]) -> None:
        self.on = self.always or torch.equal(args[0], self.images)


class Fault(nn.Module):
    """Applies a fault to the output of a layer while the switch is on."""

    def __init__(self, inner: nn.Module, switch: Switch, fault: Callable[[Tensor], Tensor]):
        super().__init__()
        self.inner, self.switch, self.fault = inner, switch, fault

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        return self.fault(y) if self.switch.on else y


class FaultyLoss(CrossEntropy):
    switch: Switch
    fault = staticmethod(lambda loss: loss * math.nan)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        loss = super().forward(input, target)
        return self.fault(loss) if self.switch.on else loss


def infinite(x: Tensor) -> Tensor:
    return x / 0


def steep(x: Tensor) -> Tensor:
    """The identity, with a NaN derivative."""
    return x + (0 * x).abs().sqrt()


class Recording:
    """A fault that keeps its inputs."""

    def __init__(self, fault: Callable[[Tensor], Tensor]):
        self.fault, self.seen = fault, list[Tensor]()

    def __call__(self, y: Tensor) -> Tensor:
        self.seen.append(y)
        return self.fault(y)

    def __deepcopy__(self, memo: Any) -> "Recording":
        return self  # a copy of the network adds to the same list


class Snapshots(lightning.Callback):
    """Weights and optimizer state before a given batch, and buffers after the last one."""

    def __init__(self, epoch: int, batch: int):
        self.at = epoch, batch

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if (trainer.current_epoch, batch_idx) == self.at:
            self.before = state(trainer, module)

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        self.buffers = {n: b.clone() for n, b in module.named_buffers()}


def state(trainer: Any, module: Any) -> Any:
    parameters = dict(module.network.named_parameters())
    return copy.deepcopy((parameters, trainer.optimizers[0].state_dict()["state"]))


def assert_equal(a: Any, b: Any) -> None:
    """Bitwise equal."""
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


class Run:
    """A run on fashion_mnist_mini into which faults can be injected."""

    def __init__(
        self, directory: Path, *overrides: str, deferred: bool = False, snapshots: Any = (0, 0)
    ):
        cfg = compose(
            [
                "data=fashion_mnist_mini",
                "trainer=cpu",
                "trainer.progress_bar=false",
                f"trainer.max_epochs={EPOCHS}",
                f"+trainer.limit_train_batches={BATCHES}",
                f"data.batch_size={BATCH}",
                "data.val_size=500",
                "data.eval_batch_size=100",
                "data.crop=2",
                *overrides,
            ]
        )
        lightning.seed_everything(cfg.seed, verbose=False)
        self.data = build(cfg.data)
        self.data.prepare()
        shape = {"in_shape": self.data.shape, "num_classes": self.data.num_classes}
        self.network = build(cfg.model, conv=build(cfg.backend), **shape)
        optimizer, scheduler = build(cfg.optimizer), build(cfg.scheduler) if cfg.scheduler else None
        self.loss = FaultyLoss()
        self.module = Classifier(self.network, self.loss, optimizer, scheduler, seed=cfg.seed)
        self.loaders = self.data.train_loader(cfg.seed), self.data.val_loader()
        self.loss.switch = Switch(self.network, torch.empty(0))
        self.snapshots = Snapshots(*snapshots)
        self.file = directory / "not_finite.pt"
        self.finite = NaNGuard(directory, self.data.split()[0], deferred=deferred)
        self.trainer = build(
            cfg.trainer,
            default_root_dir=directory,
            logger=False,
            callbacks=[self.finite, self.snapshots],
        )

    def inject(self, name: str, fault: Callable[[Tensor], Tensor], images: Tensor) -> None:
        """Replace a layer by a faulty one."""
        faulty = Fault(self.network.get_submodule(name), Switch(self.network, images), fault)
        self.network.set_submodule(name, faulty)

    def fit(self) -> None:
        self.trainer.fit(self.module, *self.loaders)

    def stopped(self) -> NonFiniteError:
        with pytest.raises(NonFiniteError) as caught:
            self.fit()
        assert "\n" not in str(caught.value)
        json.dumps(caught.value.details, allow_nan=False)
        return caught.value

    def train_batch(self, epoch: int, batch: int) -> Tensor:
        return self.loaders[0].batch(epoch, batch)[0]


@both
@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_no_update_from_the_bad_batch_on(tmp_path: Path, optimizer: str, deferred: bool) -> None:
    run = Run(tmp_path, f"optimizer={optimizer}", deferred=deferred, snapshots=(1, 3))
    run.inject("features.3", infinite, run.train_batch(1, 3))
    error = run.stopped()
    step = BATCHES + 3
    lr = run.trainer.lr_scheduler_configs[0].scheduler
    assert_equal(state(run.trainer, run.module), run.snapshots.before)
    assert run.trainer.global_step == (2 * BATCHES if deferred else step)  # it was bad for long
    found = error.details["not_finite"]
    assert (found["epoch"], found["batch"], found["step"]) == (2, 4, step)
    assert found["layer"] == "features.3"
    assert found["loss"] in ("inf", "nan")
    # one_cycle, cosine up: from lr / 25 at step 0 to lr at the step half of the run - 1
    peak = lr.optimizer.param_groups[0]["max_lr"]
    risen = (1 - math.cos(math.pi * step / (EPOCHS * BATCHES / 2 - 1))) / 2
    assert found["lr"] == pytest.approx(peak / 25 + (peak - peak / 25) * risen)
    assert str(error) == (
        f"epoch 2/3, batch 4, step {step}, lr {found['lr']:.3g}: the loss of 20 images is "
        f"{found['loss']}; the first layer with a non-finite output is features.3 (Fault); "
        f"to reproduce it: {run.file}"
    )


def test_deferred_check_reports_the_same(tmp_path: Path) -> None:
    reports = []
    for deferred in (False, True):
        run = Run(tmp_path, deferred=deferred)
        run.inject("features.4", infinite, run.train_batch(0, 6))
        error = run.stopped()
        saved = torch.load(run.file, weights_only=True)
        del saved["state_dict"]  # later batches have moved running statistics
        tensors = {name: saved.pop(name) for name in ("images", "labels", "indices")}
        reports.append((str(error), str(error.details), str(saved), tensors))
    assert reports[0][:3] == reports[1][:3]
    assert_equal(reports[0][3], reports[1][3])


@both
def test_saved_batch_reproduces_it(tmp_path: Path, deferred: bool) -> None:
    run = Run(tmp_path, deferred=deferred, snapshots=(0, 2))
    with torch.no_grad():  # squared in the variance, it overflows
        run.network.features[4].weight[0] = 3e38
    # As every batch is bad, the first one is.
    error = run.stopped()
    saved = torch.load(run.file, weights_only=True)
    indices, labels = run.data.read("train")[1], saved["labels"]
    assert saved["indices"].tolist() == error.details["not_finite"]["indices"]
    assert_equal(torch.from_numpy(indices[saved["indices"]]).long(), labels)
    assert not set(saved["indices"].tolist()) & set(run.data.split()[1].tolist())

    network = Run(tmp_path).network
    network.load_state_dict(saved["state_dict"])
    outputs: list[tuple[str, Tensor]] = []
    for name, layer in network.named_modules():
        layer.register_forward_hook(lambda _, __, y, name=name: outputs.append((name, y)))
    torch.manual_seed(saved["torch_seed"])
    loss = nn.functional.cross_entropy(network.train()(saved["images"]), labels)
    assert str(loss.item()) == str(saved["loss"])
    assert next(n for n, y in outputs if not y.isfinite().all()) == saved["layer"] == "features.4"


def test_repeated_batch_has_the_same_dropout_and_changes_nothing(tmp_path: Path) -> None:
    run = Run(tmp_path, "trainer.log_every_n_steps=6", deferred=True)
    run.inject("classifier.1", dropout := Recording(infinite), run.train_batch(0, 4))
    error = run.stopped()
    assert error.details["not_finite"]["layer"] == "classifier.1"
    first, again = dropout.seen
    assert_equal(first == 0, again == 0)
    assert (first == 0).any()
    assert_equal(dict(run.module.named_buffers()), run.snapshots.buffers)
    assert run.network.training


def test_fault_that_is_not_repeated(tmp_path: Path) -> None:
    run = Run(tmp_path, deferred=True)
    faults = [infinite]
    run.inject("features.4", lambda y: faults.pop()(y) if faults else y, run.train_batch(0, 1))
    error = run.stopped()
    assert (
        "the loss of 20 images is nan; when the batch is repeated, all numbers are finite"
        in str(error)
    )
    assert error.details["not_finite"]["batch"] == 2


@both
@pytest.mark.parametrize(("value", "gradients"), [(math.nan, "bad"), (math.inf, "finite")])
def test_loss_function(tmp_path: Path, value: float, gradients: str, deferred: bool) -> None:
    run = Run(tmp_path, deferred=deferred, snapshots=(0, 2))
    run.loss.switch.images = run.train_batch(0, 2)
    run.loss.fault = lambda loss: loss * value if gradients == "bad" else loss + value
    error = run.stopped()
    message = f"is {value}; every output is finite, but the loss of FaultyLoss is not; to reproduce"
    assert message in str(error)
    assert error.details["not_finite"]["layer"] is None
    assert_equal(state(run.trainer, run.module), run.snapshots.before)


@both
def test_gradient_alone(tmp_path: Path, deferred: bool) -> None:
    run = Run(tmp_path, deferred=deferred, snapshots=(0, 5))
    run.inject("features.6", steep, run.train_batch(0, 5))
    error = run.stopped()
    assert_equal(state(run.trainer, run.module), run.snapshots.before)
    found = error.details["not_finite"]
    assert 1 < found["loss"] < 4
    assert (found["batch"], found["layer"], found["parameter"]) == (
        6,
        "features.5",
        "features.5.weight",
    )
    assert "every output is finite, but not the gradient of features.5.weight (BatchNorm" in str(
        error
    )


@both
def test_clipping_does_not_hide_a_non_finite_gradient(tmp_path: Path, deferred: bool) -> None:
    options = ("trainer.gradient_clip_val=0.5",)
    run = Run(tmp_path, *options, deferred=deferred, snapshots=(0, 5))
    run.inject("features.6", steep, run.train_batch(0, 5))
    assert run.stopped().details["not_finite"]["batch"] == 6
    assert_equal(state(run.trainer, run.module), run.snapshots.before)


@both
@pytest.mark.parametrize("fault", [infinite, steep])
def test_first_bad_batch_of_an_update(
    tmp_path: Path, fault: Callable[[Tensor], Tensor], deferred: bool
) -> None:
    options = ("trainer.accumulate_grad_batches=4",)
    run = Run(tmp_path, *options, deferred=deferred, snapshots=(1, 5))
    run.inject("features.3", fault, run.train_batch(1, 5))
    found = run.stopped().details["not_finite"]
    assert (found["epoch"], found["batch"], found["step"]) == (2, 6, 3)
    assert_equal(state(run.trainer, run.module), run.snapshots.before)


@both
def test_bfloat16(tmp_path: Path, deferred: bool) -> None:
    run = Run(tmp_path, "trainer.precision=bf16-mixed", deferred=deferred)
    run.inject("features.0", large := Recording(infinite), run.train_batch(0, 2))
    assert run.stopped().details["not_finite"]["layer"] == "features.0"
    assert [y.dtype for y in large.seen] == [torch.bfloat16] * 2


@both
@pytest.mark.parametrize("average", [(), ("trainer.ema=0.9",)], ids=["", "ema"])
def test_validation(tmp_path: Path, average: tuple[str, ...], deferred: bool) -> None:
    run = Run(tmp_path, *average, deferred=deferred)
    run.inject("features.7", infinite, run.loaders[1].batch(0, 3)[0])
    error = run.stopped()
    assert str(error) == "the validation loss of epoch 1/3 is not finite"
    assert error.details["not_finite"] == {"stage": "val"}
    assert not (tmp_path / "checkpoints").exists()


def test_test(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.trainer.fit_loop.max_epochs = 1
    run.fit()
    loader = run.data.test_loader()
    run.inject("features.7", infinite, loader.batch(0, 1)[0])
    with pytest.raises(NonFiniteError, match=r"^the test loss is not finite$"):
        run.trainer.test(run.module, loader, verbose=False)


@both
def test_learning_rate_too_large(tmp_path: Path, deferred: bool) -> None:
    run = Run(
        tmp_path,
        "model=shallow",  # without normalisation
        "optimizer=sgd",
        "scheduler=none",
        "optimizer.lr=1e30",
        deferred=deferred,
        snapshots=(0, 1),
    )
    error = run.stopped()
    assert str(error).startswith("epoch 1/3, batch 2, step 1, lr 1e+30: the loss of 20 images is")
    assert_equal(state(run.trainer, run.module), run.snapshots.before)
    assert all(p.isfinite().all() for p in run.network.parameters())


@both
def test_non_finite_updated_weights_are_not_saved(tmp_path: Path, deferred: bool) -> None:
    options = ("optimizer=sgd", "scheduler=none", "optimizer.lr=1e39")
    run = Run(tmp_path, *options, "trainer.log_every_n_steps=1", deferred=deferred)
    error = run.stopped()
    found = error.details["not_finite"]
    assert (found["batch"], found["parameter"]) == (1, "features.0.weight")
    assert "its gradient is finite, but not the updated features.0.weight" in str(error)
    assert not (tmp_path / "checkpoints").exists()


def test_no_checkpoint_is_written_after_the_bad_batch(tmp_path: Path) -> None:
    run = Run(tmp_path, "trainer.checkpoint_every_n_steps=2", deferred=True, snapshots=(0, 4))
    run.inject("features.3", infinite, run.train_batch(0, 4))
    assert run.stopped().details["not_finite"]["batch"] == 5
    assert run.trainer.global_step == 6  # where the next checkpoint was due
    saved = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    assert saved["global_step"] == 4
    weights = {n: saved["state_dict"][f"network.{n}"] for n in run.snapshots.before[0]}
    assert_equal(weights, {n: p.data for n, p in run.snapshots.before[0].items()})


@both
def test_weights_and_images_that_are_not_finite_already(tmp_path: Path, deferred: bool) -> None:
    run = Run(tmp_path / "weights", deferred=deferred)
    run.network.features[4].bias.data[3] = math.nan
    error = run.stopped()
    assert "is features.4 (NativeConv2d), whose bias is not finite;" in str(error)
    assert error.details["not_finite"]["parameter"] == "features.4.bias"

    run = Run(tmp_path / "images", deferred=deferred)
    run.loaders[0].normalise.shift.fill_(math.inf)
    error = run.stopped()
    assert "is features.0 (NativeConv2d), and the images are not finite;" in str(error)


@both
def test_compiled_network(tmp_path: Path, deferred: bool) -> None:
    run = Run(tmp_path, deferred=deferred)
    run.network.features[4].bias.data[3] = math.nan
    run.network.compile(backend="eager")
    error = run.stopped()
    assert "is features.4 (NativeConv2d), whose bias is not finite;" in str(error)


def test_optimizer_that_cannot_skip_updates_is_checked_every_step(tmp_path: Path) -> None:
    run = Run(tmp_path, "optimizer.fused=false", deferred=True, snapshots=(0, 3))
    run.inject("features.3", infinite, run.train_batch(0, 3))
    assert run.stopped().details["not_finite"]["step"] == run.trainer.global_step == 3
    assert_equal(state(run.trainer, run.module), run.snapshots.before)


def test_error_is_reported_if_the_file_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    run = Run(tmp_path / "file")
    run.trainer.fit_loop.max_epochs = 1
    run.inject("features.3", infinite, run.train_batch(0, 3))
    error = run.stopped()
    assert str(error).endswith(
        "the first layer with a non-finite output is features.3 (Fault); "
        f"{run.file} could not be written: Not a directory"
    )
    assert error.details["not_finite"]["saved"] is None
    assert len(error.details["not_finite"]["indices"]) == BATCH


def test_error_is_reported_if_the_diagnosis_fails(tmp_path: Path) -> None:
    run = Run(tmp_path, deferred=True)

    def once(y: Tensor) -> Tensor:
        if run.finite.unchecked and run.trainer.is_last_batch:
            raise MemoryError("no more of it")
        return infinite(y)

    run.inject("features.3", once, run.train_batch(0, 3))
    assert "looking for the layer failed: MemoryError: no more of it" in str(run.stopped())


@both
def test_finite_run_is_unchanged(tmp_path: Path, deferred: bool) -> None:
    watched, alone = Run(tmp_path, deferred=deferred), Run(tmp_path)
    alone.trainer.callbacks.remove(alone.finite)
    for run in (watched, alone):
        run.fit()
    assert_equal(state(watched.trainer, watched.module), state(alone.trainer, alone.module))
    assert not any(layer._forward_hooks for layer in watched.network.modules())
    assert not watched.file.exists()
