"""The nodes of each command's config, with the base class that each `_target_` must derive from.

Classes are named, not imported.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

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
    "enable_model_summary": "the table of layers is always shown; leave it out",
    "num_sanity_val_steps": "the network is tried on one batch before every run; leave it out",
    "check_val_every_n_epoch": "every epoch is validated; +trainer.limit_val_batches=1 shortens it",
    "val_check_interval": "every epoch is validated; +trainer.limit_train_batches=100 shortens one",
    "max_steps": "take trainer.max_epochs, and +trainer.limit_train_batches for shorter epochs",
    "min_steps": "take +trainer.min_epochs",
    "max_time": "take trainer.max_epochs, or `timeout -s INT 1h` before the command, which saves "
    "the run; resume=<run directory> continues it",
    "fast_dev_run": "take trainer.max_epochs=1 +trainer.limit_train_batches=1",
    "barebones": "take trainer.progress_bar=false tensorboard=scalars",
    "limit_predict_batches": "`cnntrain predict` takes the images to predict",
    "use_distributed_sampler": "each process gets its share of every batch; leave it out",
    "reload_dataloaders_every_n_epochs": "every epoch has a new order; leave it out",
    "profiler": "take profile=true",
    "detect_anomaly": "a run ends at the first NaN or Inf and names the layer; leave it out",
    "enable_autolog_hparams": "the config is always recorded; leave it out",
    "model_registry": "`cnntrain export` writes a model",
}


@dataclass(frozen=True)
class Node:
    """A node of the config with a `_target_`."""

    kind: str  # the base class of the target
    given: Sequence[str] = ()  # parameters that the program sets
    instead: Mapping[str, str] = field(default_factory=dict)  # of these: what to use instead
    partial: bool = False  # instantiated with _partial_: true
    filled: bool = False  # all of `given` must be parameters of the target
    unfit: Mapping[str, str] = field(default_factory=dict)  # unusable classes of that kind, and why
    extra: str | None = None  # package that must be installed


NODES = {
    "backend": Node(
        "torch.nn.Conv2d", ("in_channels", "out_channels", "kernel_size", "padding"), partial=True
    ),
    "model": Node("torch.nn.Module", ("conv", "in_shape", "num_classes"), filled=True),
    "data": Node("cnntrain.data.ImageData"),
    "optimizer": Node(
        "torch.optim.Optimizer",
        ("params",),
        partial=True,
        unfit={"torch.optim.SparseAdam": "takes sparse gradients only; torch.optim.Adam any"},
    ),
    "scheduler": Node(
        "torch.optim.lr_scheduler.LRScheduler",
        ("optimizer", "total_steps"),
        partial=True,
        unfit={
            "torch.optim.lr_scheduler.ReduceLROnPlateau": "waits for a metric, but schedules "
            "here are by step or epoch; take cnntrain.training.WarmupCosine"
        },
    ),
    "loss": Node("torch.nn.Module"),
    "trainer": Node("lightning.pytorch.Trainer", tuple(TRAINER_GIVEN), instead=TRAINER_GIVEN),
    "tensorboard": Node("cnntrain.training.Insights", ("board", "data")),
    "search": Node("cnntrain.sweeps.search.Search", extra="optuna"),
    "search.sampler": Node(
        "optuna.samplers.BaseSampler",
        ("seed",),
        partial=True,
        filled=True,
        unfit={
            "optuna.samplers.GridSampler": "needs the space again; take search/sampler=grid",
            "optuna.samplers.QMCSampler": "keeps state between trials, but each trial has a "
            "new sampler; take search/sampler=random",
        },
    ),
    "search.pruner": Node("optuna.pruners.BasePruner"),
    "sweep": Node("cnntrain.sweeps.Sweep"),
}


@dataclass(frozen=True)
class Root:
    """The root config of a command, conf/<command>.yaml."""

    nodes: tuple[str, ...]
    target: str | None = None  # function whose parameters are the other options
    given: tuple[str, ...] = ()  # options that the command handles
    optional: tuple[str, ...] = ()  # nodes that may be missing
    required: tuple[str, ...] = ()  # options without a default
    seeded: bool = True  # has a `seed`


ROOTS = {
    "train": Root(
        tuple(name for name in NODES if "." not in name),
        given=("profile", "resume"),
        optional=("tensorboard", "search", "sweep"),
    ),
    "verify": Root(("backend",), "cnntrain.lab.verify.verify", ("backend",)),
    "evaluate": Root(
        ("backend",),
        "cnntrain.inference.evaluate",
        ("backend",),
        optional=("backend",),
        required=("run",),
        seeded=False,
    ),
    "predict": Root(
        ("backend",),
        "cnntrain.inference.predict",
        ("backend", "json"),
        optional=("backend",),
        required=("run", "images"),
        seeded=False,
    ),
    "export": Root(
        (),
        "cnntrain.inference.export",
        ("folder",),
        required=("run", "format"),
        seeded=False,
    ),
    "benchmark": Root(
        ("model",), "cnntrain.lab.benchmark.benchmark", ("layers", "shape"), optional=("model",)
    ),
}
