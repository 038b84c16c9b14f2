"""`--help`: every option with its value and its comment in conf/. Imports no torch."""

import re
import string
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from cnntrain.config import config_folders
from cnntrain.terminal import PARAGRAPH, paragraph, width

COMMENTS = 36  # their column, where there is room


def show_help(cfg: DictConfig, name: str, folder: Path, extra: Path | None) -> None:
    """Print the help of a composed config with `hydra`, whose root is `name`.yaml in `folder`."""
    with config_folders(folder, extra, name):
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None
        hidden = ("hydra", "data/")  # parts of other files
        groups = hydra.format_config_groups(lambda group: not group.startswith(hidden))
    options: Any = OmegaConf.to_container(cfg)
    chosen = options.pop("hydra")["runtime"]["choices"]
    files = {name: ""} | {f"{k}/{v}": k.replace("/", ".") for k, v in chosen.items() if v}
    comments: dict[str, str] = {}
    for path, package in files.items():
        for root in filter(None, (folder, extra)):
            comments |= _comments(root / f"{path}.yaml", package)
    text = "\n".join(_lines(options, comments, min(width(), PARAGRAPH)))
    template = string.Template(cfg.hydra.help.template)
    paragraph(template.safe_substitute(APP_CONFIG_GROUPS=groups, CONFIG=f"{text}\n"))


def _comments(file: Path, package: str) -> dict[str, str]:
    """Comments of a config file and of its defaults, by option: behind the value or above it."""
    found, above, parents = dict[str, str](), list[str](), list[tuple[int, str]]()
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    if "# @package _global_" in lines:
        package = ""
    for line in lines:
        based_on = re.fullmatch(r"  - ([\w/]+)(?:@_here_)?(?: *#.*)?", line)
        if based_on and based_on[1] != "_self_":
            found |= _comments(file.parent / f"{based_on[1]}.yaml", package)
        if option := re.match(r"( *)(\w+):.*?(?:\s# *(.*))?$", line):
            indent = len(option[1])
            parents = [(depth, key) for depth, key in parents if depth < indent]
            parents.append((indent, option[2]))
            name = ".".join(filter(None, [package, *(key for _, key in parents)]))
            if comment := option[3] or " ".join(above):
                found[name] = comment
        comment_line = line.strip().startswith("#")
        above = [*above, line.strip("# ")] if comment_line else []
    return found


def _lines(
    node: Mapping[str, Any], comments: Mapping[str, str], columns: int, prefix: str = ""
) -> Iterator[str]:
    """Options as YAML, each with its comment, in lines of at most `columns` characters."""
    for key, value in node.items():
        nested = isinstance(value, Mapping) and value
        shown = "" if nested else " " + yaml.safe_dump(value, default_flow_style=True, width=1e9)
        indent = "  " * prefix.count(".")
        line = f"{indent}{key}:{shown}".removesuffix("\n...\n").rstrip()
        comment = comments.get(f"{prefix}{key}", "")
        column = COMMENTS if columns >= 2 * COMMENTS else len(indent) + 4
        beside = columns >= 2 * COMMENTS and len(line) + 24 <= columns  # else beneath it
        if not (comment and beside):
            yield line
        yield from textwrap.wrap(
            f"# {comment}" if comment else "",
            columns,
            initial_indent=f"{line if beside else '':{column - 2}}  ",
            subsequent_indent=f"{'':{column}}# ",
            break_on_hyphens=False,
        )
        if nested:
            yield from _lines(value, comments, columns, f"{prefix}{key}.")
