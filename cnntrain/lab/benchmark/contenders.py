"""Who is timed: from names, class paths and options to what is called like ``nn.Conv2d``."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import hydra
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from torch import nn

from cnntrain.config import CONF, ConfigError, Root, as_config_error, build, check
from cnntrain.config.errors import unknown
from cnntrain.lab.benchmark.peers import PEERS

MakeConv: TypeAlias = Callable[..., nn.Conv2d]


def contenders(entries: Sequence[str | Mapping[str, Any] | MakeConv]) -> dict[str, MakeConv]:
    """What the entries of the option `backends` stand for, each under its label.

    An entry is a choice of conf/backend, with the options that stand there; a peer's name; the
    dotted name of a class derived from ``nn.Conv2d``; a mapping with such a name as `_target_`,
    and options; or, from Python, what is called like ``nn.Conv2d``. Raises ConfigError with all
    that is wrong.
    """
    found: dict[str, MakeConv] = {}
    problems = [] if entries else ["backends=[]: must name at least one, such as native"]
    for entry in entries:
        try:
            label, make = _contender(entry)
            if label in found:
                problems.append(f"backends: {label} is there twice")
            found[label] = make
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    return found


def choice(group: str, name: str) -> dict[str, Any]:
    """The content of conf/<group>/<name>.yaml, found as the command line finds it."""
    with _hydra():
        found: Any = OmegaConf.to_container(hydra.compose(overrides=[f"+{group}={name}"])[group])
    return found


def _contender(entry: Any) -> tuple[str, MakeConv]:
    if callable(entry):
        return getattr(entry, "__name__", str(entry)), entry
    if isinstance(entry, Mapping):
        if "_target_" not in entry:
            raise ConfigError([f"backends={dict(entry)}: must have a _target_, the class's name"])
        node = {"_partial_": True, **entry}
        options = {k: v for k, v in node.items() if k not in ("_target_", "_partial_")}
        label = str(entry["_target_"]).rpartition(".")[2]
        label += f"({', '.join(f'{k}={v}' for k, v in options.items())})" if options else ""
        return label, _checked(node)
    with _hydra():
        choices = GlobalHydra.instance().config_loader().get_group_options("backend")
    if entry in choices:
        return entry, _checked(choice("backend", entry))
    if entry == "unfoldNd" and importlib.util.find_spec("unfoldNd") is None:
        raise ConfigError(["backends: unfoldNd is a package of its own: pip install unfoldNd"])
    if entry in PEERS:
        return entry, PEERS[entry]
    if "." not in str(entry):
        said = unknown("there is", "choice", str(entry), [*choices, *PEERS])
        raise ConfigError([f"backends=[{entry}]: {said}, or a class, as mypkg.MyConv2d"])
    return str(entry).rpartition(".")[2], _checked({"_target_": entry, "_partial_": True})


def _checked(node: Any) -> MakeConv:
    """A node of a config as what it builds, checked as `backend` is in every command."""
    cfg = OmegaConf.create({"backend": node, "seed": 0})
    if problems := check(cfg, Root(("backend",))):
        raise ConfigError([problem.replace("backend", "backends", 1) for problem in problems])
    with as_config_error("backends"):
        return build(cfg.backend)


@contextmanager
def _hydra() -> Iterator[None]:
    """Hydra as the command has started it, with its search path, or else over conf/."""
    if GlobalHydra.instance().is_initialized():
        yield
    else:
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            yield
