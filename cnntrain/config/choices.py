"""What a node of a config is called on the command line: `im2col`, not the class behind it."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from cnntrain.config.paths import CONF


def choice(group: str, node: Mapping[str, Any] | None) -> str:
    """The choice of conf/<group>/ that a node was made from, as one would type it.

    That is the file with the node's `_target_`; of several, the one whose values the node shares
    most of. Without any it is the class's dotted name, and `none` for a node that is empty.
    """
    target = (node or {}).get("_target_")
    if not node or not target:
        return "none"
    alike = {name: own for name, own in _files(group).items() if own.get("_target_") == target}
    if not alike:
        return str(target)
    return max(alike, key=lambda name: sum(node.get(k) == v for k, v in alike[name].items()))


def defaults(group: str, name: str) -> dict[str, Any]:
    """The values in conf/<group>/<name>.yaml; nothing if there is no such file."""
    return _files(group).get(name, {})


@cache
def _files(group: str) -> dict[str, dict[str, Any]]:
    """The content of every file of a group by its choice, read without composing: at once."""
    folder = CONF / group
    raw = {path.stem: _read(path) for path in sorted(folder.glob("*.yaml"))}

    def whole(name: str, above: tuple[str, ...] = ()) -> dict[str, Any]:
        own = dict(raw.get(name, {}))
        parents = own.pop("defaults", None) or []
        merged: dict[str, Any] = {}
        for parent in parents:
            if isinstance(parent, str) and parent not in (*above, name, "_self_"):
                merged |= whole(parent, (*above, name))
        return merged | own

    return {name: whole(name) for name in raw}


def _read(path: Path) -> dict[str, Any]:
    try:
        content: Any = OmegaConf.to_container(OmegaConf.load(path))
    except (OSError, YAMLError, ValueError, OmegaConfBaseException):
        return {}
    return content if isinstance(content, dict) else {}
