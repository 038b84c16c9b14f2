"""Overrides: what a person typed after the command, expanded, composed and explained.

Hydra stops at the first override that it cannot apply. Here all of them are found, each with a way
out.
"""

import difflib
import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cnntrain.config.nodes import NODES

TERSE = (LookupError, ArithmeticError, AttributeError, AssertionError, SystemExit)

# Launchers that Hydra knows once they are installed, and the packages hydra-*-launcher they are in.
LAUNCHERS = {
    "joblib": "joblib",
    "ray": "ray",
    "submitit_local": "submitit",
    "submitit_slurm": "submitit",
}

Loader = Callable[[Sequence[str]], DictConfig]


def combinations(
    overrides: Sequence[str], folder: Path, most: int | None = None
) -> list[list[str]]:
    """Every combination of a sweep's overrides, as Hydra's own sweeper expands them; of a larger
    number the first `most`.

    `folder` holds the config; `glob(...)` looks up choices there.
    """
    with hydra.initialize_config_dir(str(folder.absolute()), version_base="1.3"):
        parser = OverridesParser.create(GlobalHydra.instance().config_loader())
        axes = [_values(text, parser, most) for text in overrides]
    return [list(found) for found in itertools.islice(itertools.product(*axes), most)]


def sweeps(text: str) -> bool:
    """Whether an override stands for several values."""
    try:
        return parsed(text).is_sweep_override()
    except HydraException:
        return False


def key_of(text: str) -> str:
    """The option that an override is of: `trainer.limit_train_batches` of +trainer.limit_..=3."""
    return str(parsed(text).key_or_group)


@cache
def parsed(text: str) -> Override:
    """An override as Hydra's grammar reads it. Raises HydraException."""
    return OverridesParser.create().parse_override(text)


def options_of(overrides: Sequence[str]) -> Iterator[str]:
    """The options that overrides are of: `model`, `model.width` of model={width: 8}."""
    for text in overrides:
        key, _, value = text.lstrip("+~").partition("=")
        yield key
        if value.startswith("{"):
            inner: Any = OverridesParser.create().parse_override(text).value()
            yield from (f"{key}.{name}" for name in inner)


def merged(overrides: Sequence[str]) -> list[str]:
    """Overrides as Hydra takes them: model={...} may have new options of the node, and a value with
    letters beyond ASCII is quoted."""
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
        pass  # left for compose, which says what is wrong with it
    return [text]


def load_all(overrides: Sequence[str], load: Loader) -> tuple[DictConfig | None, list[str]]:
    """Compose; if Hydra refuses, find out which overrides are to blame and compose the rest.

    Hydra, OmegaConf and YAML refuse with errors of every class: what cannot be composed is taken
    for the mistake of who wrote it.
    """
    try:
        return load(overrides), []
    except Exception as error:
        refusal = error
    try:
        base = load([])
    except Exception as error:
        return None, [format_error(error)]
    if len(overrides) == 1:  # the one to blame
        return base, [_explain(overrides[0], refusal, base)]
    problems: list[str] = []
    kept: list[str] = []
    # Choices and classes first: whether `model.dropout` exists depends on `model=`.
    for text in sorted(
        overrides, key=lambda text: ("." in text.split("=")[0], "._target_=" not in text)
    ):
        try:
            base = load([*kept, text])
            kept.append(text)
        except Exception as error:
            problems.append(_explain(text, error, base))
    return base, problems or [format_error(refusal)]


def misplaced(overrides: Sequence[str], nodes: Sequence[str]) -> list[str]:
    """Overrides that give a node what is neither a choice nor options: a line each."""
    problems = []
    for text in overrides:
        try:
            override = parsed(text)
        except HydraException:
            continue
        key, value = override.get_key_element().lstrip("+~"), override.value()
        if key in nodes and (isinstance(value, list) or value == {}):
            problems.append(f"{text}: must name a choice of {key}")
    return problems


def _explain(text: str, error: Exception, base: DictConfig) -> str:
    try:
        override = OverridesParser.create().parse_override(text)
        key = str(override.key_or_group)
    except HydraException:
        key = ""
    if not key:
        return f"{text}: cannot be read; write option=value, in quotes if it has special characters"
    message = str(error)
    if override.is_sweep_override():
        return f"{text}: a sweep needs -m, and the values one by one: a,b,c; a list is [a,b,c]"
    if key.startswith("hydra."):
        return f"{text}: Hydra refuses it; python train.py --cfg hydra shows its options"
    if "group override must be" in message:
        return f"{text}: must name a choice of {key}; python train.py --help lists them"
    if "Multiple values for" in message:
        return f"{text}: has a choice already; write {text.lstrip('+')}"
    if f"Could not find '{key}/" in message and "Available options in" in message:
        listed = message.split("Available options in")[1].split("Config search")[0]
        choices = [line.strip() for line in listed.split("\n")[1:] if line.strip()]
        value = str(override.value())
        if key == "hydra/launcher" and value in LAUNCHERS:
            return f"{text}: is not installed; pip install hydra-{LAUNCHERS[value]}-launcher"
        return f"{text}: {unknown(f'{key} has', 'choice', value, choices)}"
    if f"Could not load '{key}/" in message:  # one of several: layers=[3x3,foo]
        name = message.split(f"Could not load '{key}/")[1].split("'")[0]
        choices = GlobalHydra.instance().config_loader().get_group_options(key)
        return f"{text}: {unknown(f'{key} has', 'choice', name, choices)}"
    if f"Could not override '{key}'" in message:
        parent, _, name = key.rpartition(".")
        node = OmegaConf.select(base, parent) if parent else base
        if not isinstance(node, DictConfig):
            return f"{text}: {unknown('there is', 'option', key, list(_flat(base)))}"
        names = [str(k) for k in node if not str(k).startswith("_")]
        inner = [full for full in _flat(base) if full.endswith(f".{name}")]
        if not parent and inner:
            return f"{text}: there is no option {name!r}; did you mean {' or '.join(inner)}?"
        problem = unknown(f"{parent} has" if parent else "there is", "option", name, names)
        target = node.get("_target_")
        others = target and "did you mean" not in problem
        more = f"; other options of {target} are added with +{text}" if others else ""
        return f"{text}: {problem}{more}"
    return f"{text}: {format_error(error)}"


def unknown(has: str, what: str, name: str, names: Sequence[str]) -> str:
    """A line that refuses a name and offers the nearest one, or all there are."""
    near = difflib.get_close_matches(name, names, n=1)
    way_out = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(sorted(names))}"
    if what == "choice" and near:
        way_out += f" (there is {', '.join(sorted(names))})"
    return f"{has} no {what} {name!r}; {way_out}"


def format_error(error: BaseException) -> str:
    """An error's message with its line breaks taken out, and its kind where that says more."""
    said = " ".join(str(error).split())
    terse = isinstance(error, TERSE) and not isinstance(error, OmegaConfBaseException)
    return f"{type(error).__name__}: {said}".removesuffix(": ") if terse or not said else said


def first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__


def format_value(value: Any) -> str:
    """A plain value as one would write it, the beginning of a long one."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 200 else f"{text[:200]}..."


def quoted(text: str) -> str:
    """A text as a value on Hydra's command line, whatever characters it has.

    Backslashes count as such unless a quote follows them, or what to OmegaConf is an interpolation.
    """
    text = re.sub(r"(\\*)\$\{", r"\1\1\\${", text)
    text = re.sub(r"(\\*)'", r"\1\1\\'", text)
    return "'" + re.sub(r"(\\+)$", r"\1\1", text) + "'"


def _flat(cfg: DictConfig) -> Iterator[str]:
    for key, value in cfg.items_ex(resolve=False):  # some have to be given, and are not yet
        yield str(key)
        if isinstance(value, DictConfig):
            yield from (f"{key!s}.{inner!s}" for inner in map(str, value))
