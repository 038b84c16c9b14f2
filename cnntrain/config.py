"""Compose a config, check it against the signatures of what it names, build objects from it.

Nothing here imports torch until something is built or a question about the machine comes up, so
that a mistyped option is answered at once. This file knows groups and kinds by name, no class.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cnntrain.overrides import load_all, one_line, unknown
from cnntrain.signatures import is_subclass, signature

# In a wheel conf/ lies beside this file, in a checkout beside the package.
_HERE = Path(__file__).parent
CONF = _HERE / "conf" if (_HERE / "conf").is_dir() else _HERE.parent / "conf"


@dataclass(frozen=True)
class Node:
    """What a node of the config with a `_target_` has to be."""

    kind: str  # the class that the target must be or derive from
    given: tuple[str, ...] = ()  # parameters that the program decides, not the config
    partial: bool = False  # called later, with what is given
    filled: bool = False  # and all of that has to be taken


# What the run itself needs to have its way with: whole epochs, validated, recorded, tested once.
TRAINER_GIVEN = (
    "default_root_dir",
    "logger",
    "callbacks",
    "enable_checkpointing",
    "enable_progress_bar",
    "enable_model_summary",
    "num_sanity_val_steps",
    "check_val_every_n_epoch",
    "max_steps",
    "fast_dev_run",
    "barebones",
)
NODES = {
    "backend": Node(
        "torch.nn.Conv2d", ("in_channels", "out_channels", "kernel_size", "padding"), partial=True
    ),
    "model": Node("torch.nn.Module", ("conv", "in_shape", "num_classes"), filled=True),
    "data": Node("cnntrain.data.ImageData"),
    "optimizer": Node("torch.optim.Optimizer", ("params",), partial=True),
    "scheduler": Node(
        "torch.optim.lr_scheduler.LRScheduler", ("optimizer", "total_steps"), partial=True
    ),
    "loss": Node("torch.nn.Module"),
    "trainer": Node("lightning.pytorch.Trainer", TRAINER_GIVEN),
}


# Options that change nothing of what is computed, only where, how it is shown and how often it is
# saved: a run may go on with others, and equal runs may differ in them.
INCIDENTAL = (
    "resume",
    "data.root",
    "trainer.accelerator",
    "trainer.progress_bar",
    "trainer.checkpoint_every_n_steps",
    "trainer.checkpoint_every_n_minutes",
    "trainer.checkpoint_every_n_epochs",
)


@dataclass(frozen=True)
class Root:
    """What a command's root config conf/<command>.yaml may hold, `seed` apart."""

    nodes: tuple[str, ...]
    target: str | None = None  # the function whose parameters are the other options
    given: tuple[str, ...] = ()  # what the command itself makes of the config, parameters or not
    optional: tuple[str, ...] = ()  # nodes that need not be there


ROOTS = {
    "train": Root(tuple(NODES), given=("resume",)),
    "verify": Root(("backend",), "cnntrain.lab.verify.verify", ("backend",)),
    "benchmark": Root(
        ("model",), "cnntrain.lab.benchmark.benchmark", ("layers", "shape"), optional=("model",)
    ),
}


class ConfigError(Exception):
    """What is wrong with a config: `problems`, one line each, for the person who wrote it."""

    def __init__(self, problems: Sequence[str]):
        self.problems = list(dict.fromkeys(problems))
        super().__init__("\n".join(self.problems))


def compose(
    overrides: Sequence[str] = (),
    *,
    name: str = "train",
    folder: Path = CONF,
    extra: Path | None = None,
) -> DictConfig:
    """The config that `python train.py <overrides>` would run, checked.

    `folder` holds the root config `name`.yaml, `extra` is a folder searched before it. Raises
    ConfigError with every problem found.
    """

    cfg, problems = _load(overrides, name, folder, extra)
    if cfg is not None:
        root = ROOTS.get(name, ROOTS["train"])  # a --config-name of the user's own is trained
        problems += check(cfg, root)
        if "trainer" in root.nodes and not any(
            p.startswith(("trainer", "optimizer")) for p in problems
        ):
            problems += contradictions(cfg)
    if problems or cfg is None:
        raise ConfigError(problems)
    return cfg


def fixed_run_directory(
    overrides: Sequence[str],
    *,
    name: str = "train",
    folder: Path = CONF,
    extra: Path | None = None,
) -> Path:
    """The run directory of a command line that names one; ConfigError if it is new every time."""
    cfg, problems = _load(overrides, name, folder, extra, return_hydra_config=True)
    if problems or cfg is None:
        raise ConfigError(problems)
    raw = OmegaConf.to_container(cfg.hydra.run)
    if isinstance(raw, dict) and "${now:" in str(raw["dir"]):
        raise ConfigError(
            ["resume=auto: needs a folder that stays the same; add hydra.run.dir=<folder>"]
        )
    try:
        HydraConfig.instance().set_config(cfg)
        return Path(cfg.hydra.run.dir)
    finally:
        HydraConfig.instance().cfg = None


def _load(
    overrides: Sequence[str], name: str, folder: Path, extra: Path | None, **options: Any
) -> tuple[DictConfig | None, list[str]]:
    def load(chosen: Sequence[str]) -> DictConfig:
        path = [f"hydra.searchpath=[{quoted(f'file://{extra}')}]"] if extra else []
        return hydra.compose(name, [*path, *chosen], **options)

    with hydra.initialize_config_dir(str(folder.absolute()), version_base="1.3", job_name=name):
        return load_all(overrides, load)


def check(cfg: DictConfig, root: Root = ROOTS["train"]) -> list[str]:
    """Every key and type of every node against the signature of its target: one line a problem."""
    options = signature(root.target).types if root.target else {}
    names = [*root.nodes, "seed", *(name for name in options if name not in root.given)]
    problems = []
    for key in map(str, cfg):
        if key in options and key not in (*root.nodes, *root.given, "seed"):
            value = OmegaConf.to_object(cfg[key]) if OmegaConf.is_config(cfg[key]) else cfg[key]
            if wrong := _mismatch(options[key](), value):
                problems.append(f"{key}={_shown(value)}: {wrong}")
        elif key not in names and key not in root.given:
            problems.append(f"{key}: {unknown('there is', 'option', key, names)}")
    if "seed" in cfg or not problems:  # else it is mistyped, as has been said
        problems += _check_seed(cfg.get("seed"))
    for key in root.nodes:
        if key not in cfg:
            problems += [] if key in root.optional else [f"{key}: missing"]
        elif cfg[key] or key != "scheduler":  # no scheduler is a constant learning rate
            problems += _check_node(key, NODES[key], cfg)
    return problems


def contradictions(cfg: DictConfig) -> list[str]:
    """Options that are right one by one and impossible together, or on this machine."""
    trainer, problems = cfg.trainer, []
    accelerator, precision = trainer.get("accelerator"), str(trainer.get("precision"))
    half = precision == "16-mixed"
    if accelerator in ("gpu", "cuda") or (half and accelerator == "auto"):
        import torch

        if not torch.cuda.is_available():
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
    for part, what in [("train", "train"), ("val", "validate"), ("test", "test")]:
        if trainer.get(f"limit_{part}_batches") == 0:
            option = f"trainer.limit_{part}_batches=0"
            problems.append(f"{option}: a run has to {what}; take 1 or more, or leave it out")
    mixed = precision.endswith("mixed")
    if mixed and cfg.optimizer.get("fused") and trainer.get("gradient_clip_val"):
        problems.append(
            f"trainer.gradient_clip_val={trainer.gradient_clip_val}: with precision={precision} "
            "the gradient cannot be clipped in front of a fused optimizer; add "
            "optimizer.fused=false"
        )
    return problems


def build(node: DictConfig, **given: Any) -> Any:
    """The object that a node describes. `given` are the parameters that the program fills in."""
    return hydra.utils.instantiate(node, **given)


@contextlib.contextmanager
def blame(option: str) -> Iterator[None]:
    """Turn a constructor's refusal of its arguments into a ConfigError that names `option`."""
    try:
        yield
    except (ValueError, TypeError, ImportError, InstantiationException) as error:
        cause = error.__cause__ if isinstance(error, InstantiationException) else error
        if isinstance(cause, ConfigError):
            raise cause from None
        said = first_line(cause or error)
        raise ConfigError(
            [said if said.startswith(f"{option}.") else f"{option}: {said}"]
        ) from error


def run_directory_problem(directory: str) -> str | None:
    """Why a run cannot have this directory for its own, if so: nothing is written to find out."""
    if not directory:
        return "hydra.run.dir=: must name a folder"
    path = Path(directory).absolute()
    if any((path / name).exists() for name in ("result.json", "results.json")):
        return (
            f"hydra.run.dir={directory}: holds another run already; go on with that one "
            f"(resume={directory}), or give this one its own folder"
        )
    above = next(p for p in (path, *path.parents) if p.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        return f"hydra.run.dir={directory}: {above} is not a folder that can be written"
    return None


def flat(cfg: DictConfig) -> dict[str, Any]:
    """Every option by its full name, `model.dropout` to 0.3; interpolations are resolved."""
    found: dict[str, Any] = {}

    def walk(node: dict[Any, Any], prefix: str) -> None:
        for key, value in node.items():
            name = f"{prefix}{key}"
            if isinstance(value, dict) and value:
                walk(value, f"{name}.")
            else:
                found[name] = value

    content = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(content, dict)
    walk(content, "")
    return found


def config_hash(cfg: DictConfig) -> str:
    """Names a config by what decides the result, whatever the order of the options."""
    options = {key: value for key, value in flat(cfg).items() if key not in INCIDENTAL}
    content = json.dumps(options, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _check_seed(value: Any) -> list[str]:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**32:
        return [f"seed={_shown(value)}: must be a whole number from 0 to 4294967295"]
    return []


def _check_node(key: str, node: Node, cfg: DictConfig) -> list[str]:
    try:
        values = OmegaConf.to_container(cfg[key], resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        return [f"{key}: {one_line(error)}"]
    if not isinstance(values, dict) or "_target_" not in values:
        return [f"{key}={cfg[key]}: must name a choice, or a class as {key}._target_"]
    target, partial = str(values.pop("_target_")), values.pop("_partial_", False)
    try:
        if not is_subclass(target, node.kind):
            return [f"{key}._target_={target}: must be a class derived from {node.kind}"]
        accepted = signature(target)
    except ImportError as error:
        return [f"{key}._target_={target}: cannot be imported: {first_line(error)}"]
    problems = []
    missing = [name for name in node.given if node.filled and name not in accepted.types]
    if missing and not accepted.open:
        problems.append(f"{key}._target_={target}: must take the parameters {', '.join(missing)}")
    if bool(partial) != node.partial:
        problems.append(f"{key}._partial_={partial}: must be {str(node.partial).lower()}")
    for name, value in ((str(name), value) for name, value in values.items()):
        option = f"{key}.{name}={_shown(value)}"
        if "_target_" in json.dumps(value, default=str):
            problems.append(f"{option}: a _target_ may stand only in {', '.join(NODES)}")
        elif name in node.given:
            problems.append(f"{option}: is decided by the program; leave it out")
        elif name not in accepted.types and not accepted.open:
            names = [n for n in accepted.types if n not in node.given]
            problems.append(f"{option}: {unknown(f'{target} has', 'option', name, names)}")
        elif name in accepted.types and (wrong := _mismatch(accepted.types[name](), value)):
            problems.append(f"{option}: {wrong}")
    return problems


def _mismatch(kind: Any, value: Any) -> str | None:
    """What keeps a plain value from being of a type, in pydantic's words."""
    from pydantic import TypeAdapter, ValidationError
    from pydantic.errors import PydanticSchemaGenerationError

    try:
        # By way of JSON, where strict still takes a list for a tuple and an int for a float.
        TypeAdapter(kind).validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        found = [
            "has too few values" if e["type"] == "missing" else e["msg"][0].lower() + e["msg"][1:]
            for e in error.errors()
        ]
        return ", or ".join(dict.fromkeys(found))
    except PydanticSchemaGenerationError:
        pass  # a type that is not for plain values: its constructor will say
    return None


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def quoted(text: str) -> str:
    """A text as a value on Hydra's command line, whatever characters it has."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
