"""The nodes of each command's config, with the base class that each `_target_` must derive from.

Classes are named, not imported.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

LEAVE_OUT = "leave it out"


def _given(*names: str) -> dict[str, str]:
    return dict.fromkeys(names, LEAVE_OUT)


# Arguments of Lightning's trainer that a run sets itself, and what to use instead.
TRAINER_GIVEN = {
    "default_root_dir": "hydra.run.dir is the run directory",
    "logger": "a run writes TensorBoard files and metrics.csv; tensorboard=full or scalars",
    "callbacks": "cnntrain.training.train(cfg, directory, callbacks=[...]) takes them in Python",
    "plugins": "trainer.precision and trainer=ddp choose them",
    "strategy": "trainer=ddp trainer.devices=2 trains in several processes",
    "processes": "trainer=ddp trainer.devices=2 trains in several processes",
    "enable_checkpointing": "trainer.checkpoint_every_n_epochs says how often a run is saved",
    "enable_progress_bar": "take trainer.progress_bar",
    "check_val_every_n_epoch": "every epoch is validated; +trainer.limit_val_batches=1 shortens it",
    "val_check_interval": "every epoch is validated; +trainer.limit_train_batches=100 shortens one",
    "max_steps": "take trainer.max_epochs, and +trainer.limit_train_batches for shorter epochs",
    "min_steps": "take +trainer.min_epochs",
    "max_time": "`timeout -s INT 1h` before the command saves the run; resume=<folder> resumes it",
    "fast_dev_run": "take trainer.max_epochs=1 +trainer.limit_train_batches=1",
    "barebones": "take trainer.progress_bar=false tensorboard=scalars",
    "limit_predict_batches": "`cnntrain predict` takes the images to predict",
    "profiler": "take profile=true",
    "detect_anomaly": "a run ends at the first NaN or Inf and names the layer; leave it out",
    "model_registry": "`cnntrain export` writes a model",
    **_given("enable_model_summary", "num_sanity_val_steps", "use_distributed_sampler"),
    **_given("reload_dataloaders_every_n_epochs", "enable_autolog_hparams"),
}


@dataclass(frozen=True)
class Node:
    """A node of the config with a `_target_`."""

    kind: str  # the base class of the target
    given: Mapping[str, str] = field(default_factory=dict)  # set by the program; what to do instead
    partial: bool = False  # instantiated with _partial_: true
    filled: bool = False  # all of `given` must be parameters of the target
    unfit: Mapping[str, str] = field(default_factory=dict)  # unusable classes of that kind, and why
    extra: str | None = None  # package that must be installed
    reader: str | None = None  # function whose parameters are options of the node, too


NODES = {
    "backend": Node(
        "torch.nn.Conv2d",
        _given("in_channels", "out_channels", "kernel_size", "padding"),
        partial=True,
    ),
    "model": Node("torch.nn.Module", _given("conv", "in_shape", "num_classes"), filled=True),
    "data": Node("cnntrain.data.ImageData"),
    "optimizer": Node(
        "torch.optim.Optimizer",
        _given("params", "optimizer", "network"),
        partial=True,
        reader="cnntrain.training.optim.scale_backbone_lr",
        unfit={"torch.optim.SparseAdam": "takes sparse gradients only; torch.optim.Adam any"},
    ),
    "scheduler": Node(
        "torch.optim.lr_scheduler.LRScheduler",
        _given("optimizer", "total_steps"),
        partial=True,
        unfit={
            "torch.optim.lr_scheduler.ReduceLROnPlateau": "waits for a metric, but schedules "
            "here are by step or epoch; take cnntrain.training.WarmupCosine"
        },
    ),
    "loss": Node("torch.nn.Module"),
    "trainer": Node("lightning.pytorch.Trainer", TRAINER_GIVEN),
    "tensorboard": Node("cnntrain.training.Insights", _given("board", "data")),
    "search": Node("cnntrain.sweeps.search.Search", extra="optuna"),
    "search.sampler": Node(
        "optuna.samplers.BaseSampler",
        _given("seed"),
        partial=True,
        filled=True,
        unfit={
            "optuna.samplers.GridSampler": "needs the space again; take search/sampler=grid",
            "optuna.samplers.QMCSampler": "keeps state between trials; take search/sampler=random",
        },
    ),
    "search.pruner": Node("optuna.pruners.BasePruner"),
    "sweep": Node("cnntrain.sweeps.Sweep"),
}


@dataclass(frozen=True)
class Root:
    """The root config of a command, conf/<command>.yaml."""

    nodes: Sequence[str]
    target: str | None = None  # function whose parameters are the other options
    types: Mapping[str, Any] = field(default_factory=dict)  # of further or other options
    optional: Sequence[str] = ()  # nodes that may be missing
    required: Sequence[str] = ()  # options without a default


ROOTS = {
    "train": Root(
        [name for name in NODES if "." not in name],
        types={"seed": int, "profile": bool, "resume": Any},
        optional=["tensorboard", "search", "sweep"],
    ),
    "verify": Root(["backend"], "cnntrain.lab.verify.verify"),
    "inspect": Root(["data"], types={"out": str | None, "json": str | None}),
    "evaluate": Root(
        ["backend"], "cnntrain.inference.evaluate", optional=["backend"], required=["run"]
    ),
    "predict": Root(
        ["backend"],
        "cnntrain.inference.predict",
        types={"json": bool},
        optional=["backend"],
        required=["run", "images"],
    ),
    "export": Root([], "cnntrain.inference.export", required=["run", "format"]),
    "benchmark": Root(
        ["model"],
        "cnntrain.lab.benchmark.benchmark",
        types={"layers": Any, "shape": Any},
        optional=["model"],
    ),
}
