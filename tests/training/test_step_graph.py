"""CUDA graph capture of training steps, with a kernel recorder for the CPU."""

import copy
import functools
import struct
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import pytest
import torch
from kernel_recorder import SYNCHRONISING, KernelRecorder
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cnntrain.config import ConfigError, compose
from cnntrain.conv import BACKENDS
from cnntrain.process_info import ProcessInfo
from cnntrain.training import Muon
from cnntrain.training.building import build_run, build_trainer
from cnntrain.training.nan_guard import NaNGuard, NonFiniteError
from cnntrain.training.step_graph import CUDAGraphs

BATCHES, EPOCHS, WARMUP = 8, 2, 3


class Steps(lightning.Callback):
    """Loss and gradients of every step."""

    def __init__(self) -> None:
        self.losses: list[Tensor] = []
        self.gradients: list[list[Tensor]] = []

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        self.losses.append(module.last_loss)
        self.gradients.append([p.grad.clone() for p in module.network.parameters()])


class Rounded(lightning.Callback):
    """Rounds learning rates to float32 in every update, as graphs do, and passes them to Muon as
    tensors, with which it rounds differently."""

    def on_train_start(self, trainer: Any, module: Any) -> None:
        optimizer = trainer.optimizers[0]
        update = optimizer.step

        @functools.wraps(update)
        def rounded(closure: Any = None) -> Any:
            loss = closure() if closure else None
            rates = [group["lr"] for group in optimizer.param_groups]
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                (group["lr"],) = struct.unpack("f", struct.pack("f", rate))
                if isinstance(optimizer, Muon):
                    group["lr"] = torch.tensor(rate, device=module.device)
            update()
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            return loss

        optimizer.step = rounded


class Run:
    """A run of `cnntrain.training.train` on a part of the small data set, without its record."""

    def __init__(self, directory: Path, *overrides: str, recorder: KernelRecorder | None = None):
        cfg = compose(
            [
                "data=fashion_mnist_mini",
                "trainer=cpu",
                "trainer.progress_bar=false",
                f"trainer.max_epochs={EPOCHS}",
                *("+trainer.limit_val_batches=1", "tensorboard=scalars"),
                "data.batch_size=100",
                "data.val_size=4230",  # leaves 770 images, the last batch has 70
                "data.crop=1",
                "scheduler=triangle",
                *overrides,
            ]
        )
        self.steps = Steps()
        eager = recorder is None and not cfg.trainer.cuda_graphs
        self.data, self.module = build_run(cfg)
        info = ProcessInfo()
        rounded = eager and cfg.optimizer.get("fused", True) and cfg.trainer.precision != "16-mixed"
        further = [self.steps, *([Rounded()] if rounded else [])]
        self.trainer = build_trainer(cfg, info, directory, self.data, self.module, further=further)
        self.recorder = recorder
        if recorder:
            self.module.recorder = recorder
        device = self.trainer.strategy.root_device
        self.loaders = self.data.train_loader(cfg.seed, device), self.data.val_loader(device)

    def fit(self, checkpoint: Path | None = None) -> "Run":
        self.trainer.fit(self.module, *self.loaders, ckpt_path=checkpoint, weights_only=True)
        return self

    def defer_nan_check(self) -> NaNGuard:
        """Defer the NaN check, as on a GPU."""
        finite = next(c for c in self.trainer.callbacks if isinstance(c, NaNGuard))
        finite.always_deferred = True
        return finite

    @property
    def everything(self) -> Any:
        state = self.trainer.optimizers[0].state_dict()["state"]
        metrics = {stage: sums.metrics(stage) for stage, sums in self.module.running.items()}
        return [self.steps.losses, self.steps.gradients, self.module.state_dict(), state, metrics]


def assert_same_bits(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize(
    "options",
    [[f"backend={name}"] for name in BACKENDS if name != "naive"]
    + [
        ["backend=naive", "model=shallow", "trainer.max_epochs=1"],
        ["backend=im2col", "trainer.precision=bf16-mixed"],
        ["trainer.gradient_clip_val=0.5", "trainer.ema=0.9", "optimizer.fused=false"],
        ["optimizer=sgd", "scheduler=cosine", "trainer.channels_last=true"],
        ["optimizer=muon"],
    ],
    ids=lambda options: " ".join(options),
)
def test_replayed_steps_are_the_same_bits(tmp_path: Path, options: list[str]) -> None:
    plain = Run(tmp_path / "plain", *options).fit()
    graphed = Run(tmp_path / "graphed", *options, recorder=KernelRecorder()).fit()
    assert_same_bits(graphed.everything, plain.everything)
    steps = len(plain.steps.losses)
    of_full_size = steps - sum(p % BATCHES == BATCHES - 1 for p in range(steps))
    updates = "optimizer.fused=false" not in options
    assert graphed.recorder.replays == [of_full_size - WARMUP] * (1 + updates)
    assert graphed.trainer.global_step == plain.trainer.global_step == steps


def test_batches_of_each_size_are_replayed(tmp_path: Path) -> None:
    options = ["trainer.max_epochs=5", "data.val_size=4730", "tensorboard=full"]  # 100, 100, 70
    plain = Run(tmp_path / "plain", *options).fit()
    graphed = Run(tmp_path / "graphed", *options, recorder=KernelRecorder()).fit()
    assert_same_bits(graphed.everything, plain.everything)
    assert graphed.recorder.replays == [10 - WARMUP] * 2 + [5 - WARMUP] * 2


def test_mixed_and_plain_labels_have_their_own_graphs(tmp_path: Path) -> None:
    options = ["data.mixup=0.3", "data.augment_epochs=1"]
    plain = Run(tmp_path / "plain", *options).fit()
    graphed = Run(tmp_path / "graphed", *options, recorder=KernelRecorder()).fit()
    assert_same_bits(graphed.everything, plain.everything)
    assert graphed.recorder.replays == [7 - WARMUP] * 4  # steps and updates of an epoch each


def test_update_with_other_settings_is_not_replayed(
    tmp_path: Path,
) -> None:
    options = ["optimizer=adam", "scheduler=one_cycle"]  # whose first beta changes as well
    plain = Run(tmp_path / "plain", *options).fit()
    graphed = Run(tmp_path / "graphed", *options, recorder=KernelRecorder()).fit()
    assert_same_bits(graphed.everything, plain.everything)
    assert graphed.recorder.replays == [14 - WARMUP, 1]


def test_update_by_other_gradients_is_not_replayed(tmp_path: Path) -> None:
    class Replace(lightning.Callback):
        def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
            if trainer.global_step % 2:
                for parameter in module.network.parameters():
                    parameter.grad = parameter.grad.sign()

    runs = []
    for recorder in (None, KernelRecorder()):
        runs.append(Run(tmp_path / str(len(runs)), recorder=recorder))
        runs[-1].trainer.callbacks.insert(0, Replace())
        runs[-1].fit()
    assert_same_bits(runs[1].everything, runs[0].everything)
    assert runs[1].recorder.replays == [14 - WARMUP, 6]


def test_resume_within_an_epoch(tmp_path: Path) -> None:
    options = ["trainer.checkpoint_every_n_steps=5", "trainer.ema=0.9"]
    whole = Run(tmp_path / "whole", *options).fit()

    class Stop(lightning.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 6:
                raise InterruptedError

    broken = Run(tmp_path / "broken", *options, recorder=KernelRecorder())
    broken.trainer.callbacks.insert(0, Stop())
    with pytest.raises(InterruptedError):
        broken.fit()
    rest = Run(tmp_path / "broken", *options, recorder=KernelRecorder())
    rest.fit(tmp_path / "broken" / "checkpoints" / "last.ckpt")
    assert rest.recorder.replays == [2 + 7 - WARMUP] * 2  # full ones that were left
    assert_same_bits(rest.everything[2:], whole.everything[2:])


def test_nan_is_reported_for_the_right_step(tmp_path: Path) -> None:
    class Spoil(lightning.Callback):
        def on_train_batch_start(
            self, trainer: Any, module: Any, batch: Any, batch_idx: int
        ) -> None:
            if batch_idx == 5:
                with torch.no_grad():  # squared in the variance, it overflows
                    module.network.features[4].weight[0] = 3e38

    reports = []
    for recorder in (None, KernelRecorder()):
        run = Run(tmp_path / str(len(reports)), recorder=recorder)
        run.trainer.callbacks.insert(0, Spoil())
        run.defer_nan_check()
        with pytest.raises(NonFiniteError) as caught:
            run.fit()
        details = caught.value.details["not_finite"]
        assert (details["batch"], details["layer"]) == (6, "features.4")
        reports.append((details["loss"], details["indices"], str(caught.value).split(";")[:2]))
    assert reports[0] == reports[1]


def test_recorder_can_be_copied() -> None:
    """With the module, before anything is captured."""
    assert copy.deepcopy(CUDAGraphs()).pool is None


class Synchronisations(TorchDispatchMode):
    """Counts the operators that synchronise the host with the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func._schema.name in SYNCHRONISING
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("backend", "optimizer", "graphs"),
    [("native", "adam", False), ("im2col", "adamw", True), ("native", "muon", True)],
)
def test_steps_synchronise_only_to_log(
    tmp_path: Path, backend: str, optimizer: str, graphs: bool
) -> None:
    synchronisations, every = Synchronisations(), 4
    at_end: list[int] = []  # synchronisations until the end of each batch

    class Count(lightning.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            at_end.append(synchronisations.count)

    options = [f"backend={backend}", "data.hflip=0.5", "data.erase=0.2", "trainer.ema=0.9"]
    options += [f"trainer.log_every_n_steps={every}", "trainer.gradient_clip_val=1"]
    options += [f"optimizer={optimizer}", "trainer.progress_bar=true", "tensorboard=full"]
    run = Run(tmp_path, *options, recorder=KernelRecorder() if graphs else None)
    run.trainer.callbacks.append(Count())
    run.defer_nan_check()
    with synchronisations:
        run.fit()
    synchronised = [
        step
        for step, (before, now) in enumerate(pairwise(at_end), 2)
        if now > before and step % BATCHES != 1  # which is the first after a validation
    ]
    assert synchronised == [step for step in range(2, BATCHES * EPOCHS + 1) if step % every == 0]


def test_step_that_synchronises_is_rejected(tmp_path: Path) -> None:
    run = Run(tmp_path, recorder=KernelRecorder())
    layer = run.module.network.features[2]
    layer.register_forward_hook(lambda _, __, y: y * y.sum().item())
    with pytest.raises(ConfigError) as caught:
        run.fit()
    assert str(caught.value) == (
        "trainer.cuda_graphs=true: a step of this run cannot be captured (operation not permitted "
        "when stream is capturing); use trainer.cuda_graphs=false"
    )


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["trainer=cpu"], "trainer.accelerator=cpu has none"),
        (
            ["trainer.accumulate_grad_batches=2", "trainer=auto"],
            "works with trainer.accumulate_grad_batches=1 only",
        ),
        (["trainer=ddp"], "works with trainer.devices=1 only"),
    ],
)
def test_options_that_exclude_graphs(options: list[str], problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose(["trainer.cuda_graphs=true", *options])
    line = f"trainer.cuda_graphs=true: {problem}; leave it out: trainer.cuda_graphs=false"
    assert line in caught.value.problems


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_graphs_without_a_gpu() -> None:
    with pytest.raises(ConfigError) as caught:
        compose(["trainer.cuda_graphs=true"])
    assert caught.value.problems == [
        "trainer.cuda_graphs=true: this machine has no NVIDIA GPU that PyTorch can use; "
        "leave it out: trainer.cuda_graphs=false"
    ]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize(
    ("backend", "precision", "optimizer"),
    [(b, p, "adam") for b in BACKENDS for p in ("32", "bf16-mixed", "16-mixed")]
    + [("im2col", "32", "muon"), ("native", "bf16-mixed", "muon")],
)
def test_cuda_graphs_compute_the_same_bits(
    tmp_path: Path, backend: str, precision: str, optimizer: str
) -> None:
    options = [f"backend={backend}", "trainer=gpu", f"trainer.precision={precision}"]
    options += [f"optimizer={optimizer}", "trainer.deterministic=true", "trainer.ema=0.9"]
    plain = Run(tmp_path / "plain", *options).fit()
    graphed = Run(tmp_path / "graphed", *options, "trainer.cuda_graphs=true").fit()
    assert graphed.module.graph
    recorded = next(iter(graphed.module.graph.captures.values()))
    assert recorded.replay is not None
    assert (recorded.update is not None) == (precision != "16-mixed")
    assert_same_bits(graphed.everything, plain.everything)
