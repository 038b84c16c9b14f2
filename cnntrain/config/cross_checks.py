"""Checks across options: valid one by one, impossible together or on this machine."""

import math
from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig, OmegaConf

from cnntrain.config.errors import format_value
from cnntrain.config.signatures import signature
from cnntrain.process_info import launched

# Parameters of schedulers that are numbers of epochs.
LENGTHS = ("T_max", "T_0", "total_iters", "step_size", "milestones")


def cross_check(cfg: DictConfig) -> list[str]:
    """One line for each pair of options of a checked config that exclude each other."""
    checks = (_device, _graphs, _processes, _trainer, _lengths)
    return [problem for check in checks for problem in check(cfg)]


def _gpus(accelerator: str) -> tuple[str | None, int]:
    """The kind of GPU that an accelerator uses here, cuda or mps, and their number."""
    import torch

    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return "cuda", torch.cuda.device_count()
    if accelerator in ("auto", "gpu", "mps") and torch.backends.mps.is_available():
        return "mps", 1
    return None, 0


def _device(cfg: DictConfig) -> Iterator[str]:
    accelerator = cfg.trainer.get("accelerator", "auto")
    half = str(cfg.trainer.get("precision")) == "16-mixed"
    if not (half or accelerator in ("gpu", "cuda", "mps")) or _gpus(accelerator)[0]:
        return
    if accelerator not in ("auto", "cpu"):
        yield (
            f"trainer.accelerator={accelerator}: this machine has no GPU that PyTorch can use; "
            "take trainer=cpu or trainer=auto"
        )
    if half:
        yield (
            "trainer.precision=16-mixed: float16 trains only on a GPU; take "
            "trainer.precision=bf16-mixed or 32"
        )


def _graphs(cfg: DictConfig) -> Iterator[str]:
    trainer = cfg.trainer
    if not trainer.get("cuda_graphs"):
        return
    graphs, leave_out = "trainer.cuda_graphs=true", "leave it out: trainer.cuda_graphs=false"
    if (accelerator := trainer.get("accelerator", "auto")) not in ("auto", "gpu", "cuda"):
        yield f"{graphs}: trainer.accelerator={accelerator} has none; {leave_out}"
    elif _gpus(accelerator)[0] != "cuda":
        yield f"{graphs}: this machine has no NVIDIA GPU that PyTorch can use; {leave_out}"
    if trainer.get("devices", 1) * trainer.get("num_nodes", 1) > 1:
        yield f"{graphs}: works with trainer.devices=1 only; {leave_out}"
    if trainer.get("accumulate_grad_batches", 1) > 1:
        yield f"{graphs}: works with trainer.accumulate_grad_batches=1 only; {leave_out}"


def _processes(cfg: DictConfig) -> Iterator[str]:
    """Whether there are as many processes and GPUs as `devices` and `num_nodes` say."""
    trainer, info = cfg.trainer, launched()
    devices, nodes = trainer.get("devices", 1), trainer.get("num_nodes", 1)
    if info and (info.devices, info.nodes) != (devices, nodes):
        yield (
            f"trainer.devices={devices} times trainer.num_nodes={nodes}: is not what "
            f"{info.launcher} has started, {info.devices} processes times {info.nodes} machines; "
            f"take trainer=ddp trainer.devices={info.devices} trainer.num_nodes={info.nodes}"
        )
    elif nodes > 1 and not info:
        yield (
            f"trainer.num_nodes={nodes}: each of the machines has to start its processes: "
            f"torchrun --nnodes {nodes} --nproc-per-node {devices} ... train.py ..., or srun"
        )
    elif devices > 1:
        kind, gpus = _gpus(trainer.get("accelerator", "auto"))
        if kind and devices > gpus:
            yield (
                f"trainer.devices={devices}: this machine has {gpus} GPUs, one per process; "
                f"take trainer.devices={gpus}, or trainer.accelerator=cpu"
            )
        if trainer.get("sync_batchnorm") and kind != "cuda":
            yield "trainer.sync_batchnorm=true: PyTorch has it for GPUs only; leave it out"


def _trainer(cfg: DictConfig) -> Iterator[str]:
    trainer = cfg.trainer
    for part in ("train", "val", "test"):
        limit = trainer.get(f"limit_{part}_batches")
        option = f"trainer.limit_{part}_batches={format_value(limit)}"
        if limit == 0:
            yield f"{option}: every run has a {part} pass; take 1 or more, or leave it out"
        elif limit is not None and part != "test" and trainer.get("overfit_batches"):
            yield f"{option}: trainer.overfit_batches sets it; leave one of them out"
        elif part == "test" and isinstance(limit, float) and 0 < limit < 1:
            yield f"{option}: must not be a fraction; take a whole number, or leave it out"
    algorithm, clip = trainer.get("gradient_clip_algorithm"), trainer.get("gradient_clip_val")
    if algorithm and clip is None:
        yield (
            f"trainer.gradient_clip_algorithm={algorithm}: needs a limit; add "
            "trainer.gradient_clip_val=1"
        )
    if trainer.get("benchmark") and trainer.get("deterministic"):
        yield (
            "trainer.benchmark=true: chooses algorithms by speed, which "
            "trainer.deterministic=true forbids; leave one of them out"
        )
    epochs, least = trainer.get("max_epochs"), trainer.get("min_epochs")
    if epochs is not None and least is not None and least > epochs:
        yield (
            f"trainer.min_epochs={least}: is more than trainer.max_epochs={epochs}; take "
            f"{epochs} or less"
        )
    if clip and str(trainer.get("precision")).endswith("mixed") and cfg.optimizer.get("fused"):
        yield (
            f"trainer.gradient_clip_val={clip}: with precision={trainer.precision} gradients "
            "cannot be clipped before a fused optimizer; add optimizer.fused=false"
        )


def _lengths(cfg: DictConfig) -> Iterator[str]:
    """A schedule by epochs that is longer than the run."""
    epochs = cfg.trainer.get("max_epochs")
    if not cfg.get("scheduler") or "total_steps" in signature(cfg.scheduler._target_).types:
        return
    scheduler: Any = OmegaConf.to_container(cfg.scheduler, resolve=True)
    for name in LENGTHS:
        value = scheduler.get(name)
        values = value if isinstance(value, list) else [value]
        numbers = [number for number in values if isinstance(number, (int, float))]
        option = f"scheduler.{name}={format_value(value)}"
        if min(numbers, default=1) < 1:
            yield f"{option}: must be 1 epoch or more"
        elif epochs is not None and max(numbers, default=1) > epochs:
            yield (
                f"{option}: is longer than the run, trainer.max_epochs={epochs}; take at most "
                f"{epochs}, or more epochs"
            )


def cross_check_data(cfg: DictConfig, data: Any) -> list[str]:
    """One line for each option that does not fit the image size or number of images."""
    problems = []
    crop, smallest = cfg.data.get("crop", 0), min(data.shape[1:])
    if crop >= smallest:
        problems.append(
            f"data.crop={crop}: on images of {data.shape[1]}x{data.shape[2]} a crop may contain "
            f"only padding; take less than {smallest}"
        )
    for name in ("trivial_augment", "color_jitter"):
        if (value := cfg.data.get(name)) and data.shape[0] not in (1, 3):
            channels = f"is for images with 1 or 3 channels, not {data.shape[0]}; leave it out"
            problems.append(f"data.{name}={format_value(value)}: {channels}")
    images = data.train_size - data.val_size
    whole = math.ceil(images / data.batch_size)
    batches = {"train": whole, "val": math.ceil(data.val_size / data.eval_batch_size)}
    for part, number in batches.items():
        name = "overfit_batches" if cfg.trainer.get("overfit_batches") else f"limit_{part}_batches"
        limit = cfg.trainer.get(name)
        if isinstance(limit, float) and 0 < limit <= 1:
            batches[part] = int(number * limit)
        elif isinstance(limit, int):
            batches[part] = min(number, limit)
        if batches[part] == 0:
            problems.append(
                f"trainer.{name}={limit}: is less than one of {number} {part} batches; "
                "take a larger share, or a whole number"
            )
    accumulated = cfg.trainer.get("accumulate_grad_batches", 1)
    if 0 < batches["train"] < accumulated:
        problems.append(
            f"trainer.accumulate_grad_batches={accumulated}: an epoch has {batches['train']} "
            f"batches; take at most that, or a smaller data.batch_size"
        )
    processes = cfg.trainer.get("devices", 1) * cfg.trainer.get("num_nodes", 1)
    rest = images - (whole - 1) * data.batch_size  # of the last batch of an epoch
    smallest = rest if batches["train"] == whole else data.batch_size
    if smallest < processes:
        problems.append(
            f"data.batch_size={data.batch_size}: a batch of {smallest} of the {images} images "
            f"cannot be shared by {processes} processes (trainer.devices); take another"
        )
    return problems
