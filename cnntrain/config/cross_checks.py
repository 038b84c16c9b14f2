"""Checks across options: valid one by one, impossible together or on this machine."""

import math
from typing import Any

from omegaconf import DictConfig, OmegaConf

from cnntrain.config.errors import format_value
from cnntrain.config.signatures import signature
from cnntrain.process_info import launched

# Parameters of schedulers that are numbers of epochs.
LENGTHS = ("T_max", "T_0", "total_iters", "step_size", "milestones")


def cross_check(cfg: DictConfig) -> list[str]:
    """One line for each pair of options of a checked config that exclude each other."""
    return [
        *_profile(cfg),
        *_device(cfg),
        *_graphs(cfg),
        *_processes(cfg),
        *_trainer(cfg),
        *_lengths(cfg),
    ]


def _profile(cfg: DictConfig) -> list[str]:
    if isinstance(cfg.get("profile", False), bool):
        return []
    return [f"profile={format_value(cfg.profile)}: must be true or false"]


def _device(cfg: DictConfig) -> list[str]:
    trainer, problems = cfg.trainer, []
    accelerator, precision = trainer.get("accelerator"), str(trainer.get("precision"))
    half = precision == "16-mixed"
    if accelerator in ("gpu", "cuda", "mps") or (half and accelerator == "auto"):
        import torch

        mps = accelerator != "cuda" and torch.backends.mps.is_available()
        if not mps and (accelerator == "mps" or not torch.cuda.is_available()):
            if accelerator != "auto":
                problems.append(
                    f"trainer.accelerator={accelerator}: this machine has no GPU that PyTorch "
                    "can use; take trainer=cpu or trainer=auto"
                )
            accelerator = "cpu"
    if half and accelerator == "cpu":
        problems.append(
            f"trainer.precision={precision}: float16 trains only on a GPU; "
            "take trainer.precision=bf16-mixed or 32"
        )
    return problems


def _graphs(cfg: DictConfig) -> list[str]:
    trainer = cfg.trainer
    if not trainer.get("cuda_graphs"):
        return []
    accelerator, problems = trainer.get("accelerator", "auto"), []
    import torch

    if accelerator not in ("auto", "gpu", "cuda"):
        problems.append(f"trainer.accelerator={accelerator} has none; take trainer=gpu, or")
    elif not torch.cuda.is_available():
        problems.append("this machine has no NVIDIA GPU that PyTorch can use;")
    if trainer.get("devices", 1) * trainer.get("num_nodes", 1) > 1:
        problems.append("works with one process only; take trainer.devices=1, or")
    batches = trainer.get("accumulate_grad_batches", 1)
    if batches > 1:
        problems.append(
            f"needs a step for each batch; take trainer.accumulate_grad_batches=1 instead of "
            f"{batches}, or"
        )
    return [
        f"trainer.cuda_graphs=true: {problem} leave it out: trainer.cuda_graphs=false"
        for problem in problems
    ]


def _processes(cfg: DictConfig) -> list[str]:
    """Whether there are as many processes and GPUs as `devices` and `num_nodes` say."""
    trainer, info = cfg.trainer, launched()
    devices, nodes = trainer.get("devices", 1), trainer.get("num_nodes", 1)
    if info and (info.devices, info.nodes) != (devices, nodes):
        return [
            f"trainer.devices={devices} times trainer.num_nodes={nodes}: is not what "
            f"{info.launcher} has started, {info.devices} processes times {info.nodes} "
            f"machines; take trainer=ddp trainer.devices={info.devices} "
            f"trainer.num_nodes={info.nodes}"
        ]
    if nodes > 1 and not info:
        return [
            f"trainer.num_nodes={nodes}: each of the machines has to start its processes: "
            f"torchrun --nnodes {nodes} --nproc-per-node {devices} ... train.py ..., or srun"
        ]
    if devices == 1:
        return []
    import torch

    problems, accelerator = [], trainer.get("accelerator", "auto")
    cuda = accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    mps = accelerator in ("auto", "gpu", "mps") and torch.backends.mps.is_available()
    if cuda and devices > (gpus := torch.cuda.device_count()):
        problems.append(
            f"trainer.devices={devices}: this machine has {gpus} GPUs for one process each; "
            f"take trainer.devices={gpus}, or trainer.accelerator=cpu"
        )
    elif mps and not cuda:
        problems.append(
            f"trainer.devices={devices}: an Apple GPU trains in one process; take "
            "trainer.devices=1, or trainer.accelerator=cpu"
        )
    if trainer.get("sync_batchnorm") and not cuda:
        problems.append(
            "trainer.sync_batchnorm=true: PyTorch has it for GPUs only; leave it out, or take "
            "model.norm=false"
        )
    return problems


def _trainer(cfg: DictConfig) -> list[str]:
    trainer, problems = cfg.trainer, []
    for part, what in [("train", "train"), ("val", "validate"), ("test", "test")]:
        limit = trainer.get(f"limit_{part}_batches")
        option = f"trainer.limit_{part}_batches={format_value(limit)}"
        if limit == 0:
            problems.append(f"{option}: a run has to {what}; take 1 or more, or leave it out")
        elif limit is not None and part != "test" and trainer.get("overfit_batches"):
            problems.append(f"{option}: trainer.overfit_batches sets it; leave one of them out")
    limit = trainer.get("limit_test_batches")
    if isinstance(limit, float) and 0 < limit < 1:
        problems.append(
            f"trainer.limit_test_batches={limit}: a fraction is not supported here; take a "
            "whole number, or leave it out"
        )
    if trainer.get("gradient_clip_algorithm") and trainer.get("gradient_clip_val") is None:
        problems.append(
            f"trainer.gradient_clip_algorithm={trainer.gradient_clip_algorithm}: needs a limit; "
            "add trainer.gradient_clip_val=1"
        )
    if trainer.get("benchmark") and trainer.get("deterministic"):
        problems.append(
            "trainer.benchmark=true: chooses algorithms by speed, which "
            "trainer.deterministic=true forbids; leave one of them out"
        )
    epochs, least = trainer.get("max_epochs"), trainer.get("min_epochs")
    if epochs is not None and least is not None and least > epochs:
        problems.append(
            f"trainer.min_epochs={least}: is more than trainer.max_epochs={epochs}; take {epochs} "
            "or less"
        )
    mixed = str(trainer.get("precision")).endswith("mixed")
    if mixed and cfg.optimizer.get("fused") and trainer.get("gradient_clip_val"):
        problems.append(
            f"trainer.gradient_clip_val={trainer.gradient_clip_val}: with "
            f"precision={trainer.precision} gradients cannot be clipped before a fused "
            "optimizer; add optimizer.fused=false"
        )
    return problems


def _lengths(cfg: DictConfig) -> list[str]:
    """A schedule by epochs that is longer than the run."""
    epochs, problems = cfg.trainer.get("max_epochs"), []
    if not cfg.get("scheduler") or "total_steps" in signature(cfg.scheduler._target_).types:
        return []
    for name in LENGTHS:
        value = cfg.scheduler.get(name)
        plain: Any = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
        numbers = [n for n in (plain if isinstance(plain, list) else [plain]) if _number(n)]
        option = f"scheduler.{name}={format_value(plain)}"
        if any(n < 1 for n in numbers):
            problems.append(f"{option}: must be 1 epoch or more")
        elif epochs is not None and any(n > epochs for n in numbers):
            problems.append(
                f"{option}: is longer than the run, trainer.max_epochs={epochs}; take at most "
                f"{epochs}, or more epochs"
            )
    return problems


def cross_check_data(cfg: DictConfig, data: Any) -> list[str]:
    """One line for each option that does not fit the image size or number of images."""
    problems = []
    crop, smallest = cfg.data.get("crop", 0), min(data.shape[1:])
    if crop >= smallest:
        problems.append(
            f"data.crop={crop}: on images of {data.shape[1]}x{data.shape[2]} a crop may then "
            f"contain only padding; take less than {smallest}"
        )
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


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
