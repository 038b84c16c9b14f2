"""Command-line overrides: parsed, expanded for sweeps, and explained where they are invalid."""

import itertools
import re
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from cnntrain.config.errors import format_error, unknown
from cnntrain.config.nodes import NODES


def combinations(
    overrides: Sequence[str], folder: Path, most: int | None = None
) -> list[list[str]]:
    """Every combination of a sweep's overrides, as Hydra's sweeper expands them.

    Args:
        folder: The config folder, in which `glob(...)` looks up choices.
        most: Stop after this many.
    """
    with hydra.initialize_config_dir(str(folder.absolute()), version_base="1.3"):
        parser = OverridesParser.create(GlobalHydra.instance().config_loader())
        axes = [_values(text, parser, most) for text in overrides]
    return [list(found) for found in itertools.islice(itertools.product(*axes), most)]


def sweeps(text: str) -> bool:
    """Whether an override has several values."""
    try:
        return parsed(text).is_sweep_override()
    except HydraException:
        return False


def key_of(text: str) -> str:
    """The option of an override: `trainer.min_epochs` of +trainer.min_epochs=3."""
    return str(parsed(text).key_or_group)


@cache
def parsed(text: str) -> Override:
    """An override, parsed by Hydra. Raises HydraException."""
    return OverridesParser.create().parse_override(text)


def options_of(overrides: Sequence[str]) -> Iterator[str]:
    """The options that overrides set: `model` and `model.width` of model={width: 8}."""
    for text in overrides:
        key, _, value = text.lstrip("+~").partition("=")
        yield key
        if value.startswith("{"):
            inner: Any = OverridesParser.create().parse_override(text).value()
            yield from (f"{key}.{name}" for name in inner)


def merged(overrides: Sequence[str]) -> list[str]:
    """Overrides as Hydra accepts them: model={...} may add options to the node, and values beyond
    ASCII are quoted."""
    nodes = "|".join(map(re.escape, NODES))
    texts = [re.sub(rf"^\+?(?=({nodes})=\{{)", "++", text) for text in overrides]
    return [
        text if text.isascii() else re.sub(r"^([^=]+)=([^'\"\[{(,][^',]*)$", r"\1='\2'", text)
        for text in texts
    ]


def _values(text: str, parser: OverridesParser, most: int | None) -> list[str]:
    try:
        (override,) = parser.parse_overrides([text])
        if override.is_sweep_override() and override.is_discrete_sweep():
            key = override.get_key_element()
            values = itertools.islice(override.sweep_string_iterator(), most)
            return [f"{key}={value}" for value in values]
    except HydraException:
        pass  # reported when it is composed
    return [text]


def quoted(text: str) -> str:
    """Quote a text of any characters as a value on Hydra's command line.

    Backslashes are literal unless followed by a quote or an interpolation.
    """
    text = re.sub(r"(\\*)\$\{", r"\1\1\\${", text)
    text = re.sub(r"(\\*)'", r"\1\1\\'", text)
    return "'" + re.sub(r"(\\+)$", r"\1\1", text) + "'"


def explain(text: str, error: Exception, base: DictConfig) -> str:
    """The line for an override that `base` does not take."""
    try:
        override = parsed(text)
        key, value = str(override.key_or_group), override.value()
    except HydraException:
        key = ""
    if not key:
        return f"{text}: cannot be read; write option=value, in quotes if it has special characters"
    if override.is_sweep_override():
        return f"{text}: a sweep needs -m, and the values one by one: a,b,c; a list is [a,b,c]"
    choices: list[str] = GlobalHydra.instance().config_loader().get_group_options(key)
    if choices:
        names: list[Any] = value if isinstance(value, list) else [value]
        if not all(isinstance(name, str) for name in names):
            return f"{text}: must name a choice of {key}; python train.py --help lists them"
        if wrong := [name for name in names if name not in choices]:
            package = wrong[0].partition("_")[0]
            if key == "hydra/launcher" and package in ("joblib", "ray", "submitit"):
                return f"{text}: is not installed; pip install hydra-{package}-launcher"
            return f"{text}: {unknown(f'{key} has', 'choice', wrong[0], choices)}"
        if override.is_add():
            return f"{text}: has a choice already; write {text.lstrip('+')}"
    if key.startswith("hydra."):
        return f"{text}: Hydra rejects it; python train.py --cfg hydra shows its options"
    missing = OmegaConf.select(base, key, default=..., throw_on_missing=False) is ...
    if missing and not override.is_add() and not override.is_force_add():
        return f"{text}: {_unknown_option(text, key, base)}"
    return f"{text}: {format_error(error)}"


def _unknown_option(text: str, key: str, base: DictConfig) -> str:
    parent, _, name = key.rpartition(".")
    node = OmegaConf.select(base, parent) if parent else base
    if not isinstance(node, DictConfig):
        return unknown("there is", "option", key, list(_option_names(base)))
    if parent in NODES and name in NODES[parent].given:
        return f"is decided by the program; {NODES[parent].given[name]}"
    names = [str(k) for k in node if not str(k).startswith("_")]
    inner = [full for full in _option_names(base) if full.endswith(f".{name}")]
    if not parent and inner:
        return f"there is no option {name!r}; did you mean {' or '.join(inner)}?"
    problem = unknown(f"{parent} has" if parent else "there is", "option", name, names)
    if (target := node.get("_target_")) and "did you mean" not in problem:
        return f"{problem}; other options of {target} are added with +{text}"
    return problem


def _option_names(cfg: DictConfig) -> Iterator[str]:
    for key, value in cfg.items_ex(resolve=False):  # a required option has no value yet
        yield str(key)
        if isinstance(value, DictConfig):
            yield from (f"{key!s}.{inner!s}" for inner in map(str, value))
