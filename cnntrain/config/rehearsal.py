"""What only importing and building can find wrong with a config, found before anything is written.

A constructor says what it refuses, seldom which option that was. So options are left out in turns:
the one without which the refusal is gone, or another, is to blame.
"""

from collections.abc import Callable, Iterator

from omegaconf import DictConfig, OmegaConf

from cnntrain.config import ConfigError, blame, build
from cnntrain.config.contradictions import data_contradictions
from cnntrain.config.nodes import NODES
from cnntrain.config.overrides import one_line, shown
from cnntrain.config.source import load

Rehearse = Callable[[DictConfig], None]

MISSING = "missing"  # in Python's complaint about an argument that is left out


def rehearsal_problems(cfg: DictConfig, rehearse: Rehearse | None) -> list[str]:
    """One line for everything that is wrong with a config that `check` has found nothing in.

    `rehearse` builds from it all that will be built, writes nothing, and raises ConfigError.
    """
    if problems := list(_wrong_classes(cfg)):
        return problems
    if rehearse is None:
        return []
    return list(_refusals(cfg, rehearse)) or _contradicted(cfg)


def _wrong_classes(cfg: DictConfig) -> Iterator[str]:
    """Targets that are not what their source promised, or cannot be imported after all."""
    for key in (key for key in NODES if OmegaConf.select(cfg, key)):
        target = OmegaConf.select(cfg, key)._target_
        try:
            found, kind = load(target), load(NODES[key].kind)
        except ImportError as error:
            yield f"{key}._target_={target}: cannot be imported: {one_line(error)}"
            continue
        if not isinstance(found, type) or not issubclass(found, kind):
            yield f"{key}._target_={target}: must be a class derived from {NODES[key].kind}"


def _contradicted(cfg: DictConfig) -> list[str]:
    if "data" not in cfg:
        return []
    with blame("data"):
        return data_contradictions(cfg, build(cfg.data))


def _refusals(cfg: DictConfig, rehearse: Rehearse) -> Iterator[str]:
    """All that constructors refuse, each with the option that is to blame."""
    left_out = False
    while problems := _said(cfg, rehearse):
        node, _, what = problems[0].partition(": ")
        if left_out and MISSING in problems[0]:
            return
        if node in NODES:
            option = _to_blame(cfg, node, problems, rehearse)
            yield f"{option}={shown(_plain(cfg, option))}: {what}"
        else:  # it names the option itself
            option = node.partition("=")[0]
            yield from problems
        known = option.partition(".")[0] in NODES and _plain(cfg, option) is not None
        if not known or option.endswith("._target_"):
            return
        cfg, left_out = _without(cfg, option), True


def _said(cfg: DictConfig, rehearse: Rehearse) -> list[str]:
    try:
        rehearse(cfg)
        return []
    except ConfigError as error:
        return error.problems


def _to_blame(cfg: DictConfig, node: str, said: list[str], rehearse: Rehearse) -> str:
    related = [node, "backend"] if node == "model" else [node]
    options = [f"{n}.{key}" for n in related for key in cfg.get(n) or {} if str(key)[0] != "_"]
    instead = {option: _said(_without(cfg, option), rehearse) for option in options}
    innocent = [option for option, other in instead.items() if not other]
    changed = [o for o, other in instead.items() if other != said and MISSING not in str(other)]
    if not innocent and not changed and node == "model" and "backend" in cfg:
        native = cfg.copy()
        native.backend = {"_target_": "torch.nn.Conv2d", "_partial_": True}
        node = "backend" if _said(native, rehearse) != said else node
    return next(iter([*innocent, *changed]), f"{node}._target_")


def _without(cfg: DictConfig, option: str) -> DictConfig:
    rest = cfg.copy()
    node, _, key = option.partition(".")
    OmegaConf.set_struct(rest, False)
    del rest[node][key]
    return rest


def _plain(cfg: DictConfig, option: str) -> object:
    value = OmegaConf.select(cfg, option)
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
