"""`cnntrain verify`: one line per check of a backend, then the verdict."""

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from cnntrain.commands.app import start
from cnntrain.config import ConfigError, build, writable
from cnntrain.terminal import fit_lines, left_out_lines, paragraph, width

if TYPE_CHECKING:
    from cnntrain.lab.verify import CheckResult

COLUMNS = {"check": "36", "cases": ">6", "worst error": ">14", "budget": ">10", "unit": ">11"}
OPTIONAL = ("unit", "budget", "cases", "worst error")  # in a narrow terminal, the first one first


def main() -> None:
    start("verify", _verify, dry_run=_dry_run, one="backend")


def _dry_run(cfg: DictConfig) -> None:
    """Whether the report can be written, before a minute of checks."""
    if cfg.json in (None, "-"):
        return
    path = Path(cfg.json)
    if len(path.name.encode()) > 255 or (path.parent.is_dir() and not writable(path.parent)):
        raise ConfigError([f"json={path}: cannot be written; choose a writable folder"])


def _verify(cfg: DictConfig) -> None:
    from cnntrain.lab.verify import verify

    options: dict[str, Any] = {str(key): cfg[key] for key in cfg if key != "backend"}
    to_terminal = options["json"] == "-"
    if options["json"] is not None:
        options["json"] = None if to_terminal else Path(options["json"])
    shown: list[CheckResult] = []
    head, left_out = fit_lines(partial(_row, [*COLUMNS]), OPTIONAL, width() - len("  ok"))

    def show(line: "CheckResult") -> None:
        if not shown:
            print("\n".join([*left_out_lines(left_out, " or json=<file>"), head]))
        shown.append(line)
        numbers = f"{line.cases:,}", f"{line.error:.2g}", f"{line.budget:g}", line.unit
        text = _row([line.name, *numbers], left_out)
        verdict = "ok" if line.passed else f"FAILS on {line.failed:,}, the smallest {line.failure}"
        fits = len(text) + 2 + len(verdict) <= width()
        print(text, end="  " if fits else "\n  ")
        paragraph(verdict)
        for note in line.notes:
            paragraph(f"  not supported, not required: {note}")
        if line.rerun:  # on one line, to be pasted
            print(f"  to reproduce: {line.rerun}")

    found = verify(build(cfg.backend), **{**options, "report": None if to_terminal else show})
    if to_terminal:
        print(found.json())
    else:
        paragraph(f"\n{found.summary()}")
    if not found.passed:
        sys.exit(1)


def _row(cells: Sequence[str], left_out: Sequence[str]) -> str:
    """A line of the report without some columns."""
    named = zip(COLUMNS.items(), cells, strict=True)
    return "".join(f"{cell:{form}}" for (name, form), cell in named if name not in left_out)
