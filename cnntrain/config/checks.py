"""Check of every key and type of a config against the signatures of its targets.

Imports no torch itself.
"""

import contextlib
import json
import pickle
from functools import cache
from importlib.util import find_spec
from typing import Annotated, Any

from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from cnntrain.config.errors import format_error, format_value, unknown
from cnntrain.config.nodes import LEAVE_OUT, NODES, ROOTS, Node, Root
from cnntrain.config.options import defaults
from cnntrain.config.overrides import options_of
from cnntrain.config.signatures import is_subclass, plain, signature


def check(cfg: DictConfig, root: Root = ROOTS["train"]) -> list[str]:
    """One line for each option that its node's target does not accept."""
    from pydantic import Field

    types = {**(signature(root.target).types if root.target else {}), **root.types}
    if "seed" in types:
        types["seed"] = Annotated[int, Field(ge=0, lt=2**32)]
    problems = []
    for key in map(str, cfg):
        if key in root.nodes or (key in root.required and OmegaConf.is_missing(cfg, key)):
            continue
        if key not in types:
            names = [*root.nodes, *types]
            problems.append(f"{key}: {unknown('there is', 'option', key, names)}")
            continue
        value, wrong = _resolved(cfg, key)
        if wrong := wrong or mismatch(types[key], value):
            problems.append(f"{key}={format_value(value)}: {wrong}")
    if "seed" in root.types and "seed" not in cfg and not problems:  # else mistyped, and reported
        problems.append("seed: missing")
    for key in root.nodes:
        if key not in cfg:
            problems += [] if key in root.optional else [f"{key}: missing"]
            continue
        values, wrong = _resolved(cfg, key)
        if wrong:
            problems.append(f"{key}: {wrong}")
        elif key != "scheduler" or values not in (None, {}):  # without: a constant learning rate
            problems += _node_problems(key, pickle.dumps(values))
    return problems


@cache
def _node_problems(key: str, values: bytes) -> list[str]:
    """`check_node` of a pickled node, cached: the runs of a sweep share most nodes."""
    return check_node(key, NODES[key], pickle.loads(values))


def _resolved(cfg: DictConfig, key: str) -> tuple[Any, str | None]:
    """The value of an option or node in plain containers, or why it cannot be resolved."""
    try:
        value = cfg[key]
        if OmegaConf.is_config(value):
            value = OmegaConf.to_container(value, resolve=True, throw_on_missing=True)
        return value, None
    except MissingMandatoryValue as error:
        return None, f"{error.full_key} has to be given, {error.full_key}=..."
    except (OmegaConfBaseException, RecursionError) as error:
        return OmegaConf.to_container(cfg)[key], format_error(error)  # type: ignore[index, call-overload]


def adapt_types(cfg: DictConfig, hydra: Any) -> None:
    """Adapt the nodes of a composed config, in place, to another class typed for a choice's.

    The choice's options that the class does not take are removed, unless they were typed;
    model={_target_: ...} removes all of them.

    Args:
        hydra: The `hydra` node, which has the overrides and choices.
    """
    overrides: Any = OmegaConf.to_container(hydra.overrides.task)
    typed = set(options_of(overrides))
    for key, node in NODES.items():
        unreadable = (OmegaConfBaseException, ImportError, RecursionError)  # reported by `check`
        with contextlib.suppress(*unreadable), open_dict(cfg):
            values = OmegaConf.select(cfg, key)
            if not isinstance(values, DictConfig) or not isinstance(values._target_, str):
                continue
            replaced = f"{key}._target_" in typed
            whole = any(text.lstrip("+~").startswith(f"{key}={{") for text in overrides)
            file = defaults(key, str(hydra.runtime.choices.get(key)))
            if not replaced and values._target_ == file.get("_target_", values._target_):
                continue
            accepted = signature(values._target_)
            content: Any = OmegaConf.to_container(values, resolve=True)
            for name, value in content.items():
                option = f"{key}.{name}"
                if option in typed or option in NODES or option.startswith(f"{key}._"):
                    continue
                kind = accepted.types.get(name, Any if accepted.open else None)
                taken = not whole and kind and not mismatch(kind, value)
                if not taken and (replaced or file.get(name, ...) == value):
                    del values[name]
            if node.partial and "_partial_" not in values:
                values._partial_ = True


def check_node(key: str, node: Node, values: Any) -> list[str]:
    """As `check`, of one node in plain containers; `key` is its name in NODES."""
    if node.extra and find_spec(node.extra) is None:
        return [f"{key}: needs {node.extra.title()}; pip install {node.extra}"]
    if not isinstance(values, dict) or "_target_" not in values:
        return [f"{key}={format_value(values)}: must name a choice, or a class as {key}._target_"]
    target, partial = values.pop("_target_"), values.pop("_partial_", False)
    named = f"{key}._target_={format_value(target)}"
    if not isinstance(target, str) or not all(map(str.isidentifier, target.split("."))):
        return [f"{named}: must be the dotted name of a class, such as {node.kind}"]
    try:
        if not is_subclass(target, node.kind):
            return [f"{named}: must be a class derived from {node.kind}"]
        accepted = signature(target)
    except ImportError as error:
        return [f"{named}: cannot be imported: {error}"]
    problems = [f"{named}: {why}" for name, why in node.unfit.items() if is_subclass(target, name)]
    for inner in (name for name in NODES if name.startswith(f"{key}.")):
        if (name := inner.removeprefix(f"{key}.")) in values:
            problems += check_node(inner, NODES[inner], values.pop(name))
        else:
            problems.append(f"{inner}: missing; its file in conf/{key} begins with `defaults:`")
    types = {**accepted.types, **(signature(node.reader).types if node.reader else {})}
    missing = [name for name in node.given if node.filled and name not in accepted.types]
    if missing and not accepted.open:
        problems.append(f"{named}: must take the parameters {', '.join(missing)}")
    if bool(partial) != node.partial:
        problems.append(f"{key}._partial_={partial}: must be {str(node.partial).lower()}")
    for name, value in ((str(name), value) for name, value in values.items()):
        option = f"{key}.{name}={format_value(value)}"
        if name.startswith("_"):
            problems.append(f"{option}: is none of the class's options; {LEAVE_OUT}")
        elif '"_target_":' in json.dumps(value, default=str):
            problems.append(f"{option}: a _target_ may stand only in {', '.join(NODES)}")
        elif name in node.given:
            problems.append(f"{option}: is decided by the program; {node.given[name]}")
        elif name not in types and not accepted.open:
            names = [n for n in types if n not in node.given]
            problems.append(f"{option}: {unknown(f'{target} has', 'option', name, names)}")
        elif wrong := mismatch(types.get(name, Any), value):
            problems.append(f"{option}: {wrong}")
    return problems


def mismatch(kind: Any, value: Any) -> str | None:
    """Pydantic's message if a plain value is not of a type."""
    from pydantic import ConfigDict, TypeAdapter, ValidationError

    try:
        # By way of JSON, where strict still takes a list for a tuple and an int for a float.
        adapter = TypeAdapter(plain(kind), config=ConfigDict(allow_inf_nan=False))
        adapter.validate_json(json.dumps(value, default=str), strict=True)
    except ValidationError as error:
        found = [
            "has too few values" if e["type"] == "missing" else e["msg"][0].lower() + e["msg"][1:]
            for e in error.errors()
        ]
        marks = getattr(kind, "__metadata__", ())  # of an Annotated type
        explained = [f": {text}" for m in marks if (text := getattr(m, "description", None))]
        return "".join([", or ".join(dict.fromkeys(found)), *explained])
    return None
