"""`cnntrain verify`: one line per check of a backend, then the verdict."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from cnntrain.commands.app import start
from cnntrain.config import build
from cnntrain.terminal import paragraph, width

if TYPE_CHECKING:
    from cnntrain.lab.verify import CheckResult

ROW = "{:36}{:>6}{:>14}{:>10}{:>11}"
HEAD = ROW.format("check", "cases", "worst error", "budget", "unit")


def main() -> None:
    start("verify", _verify, one="backend")


def _verify(cfg: DictConfig) -> None:
    from cnntrain.lab.verify import verify

    options: dict[str, Any] = {str(key): cfg[key] for key in cfg if key != "backend"}
    to_terminal = options["json"] == "-"
    if options["json"] is not None:
        options["json"] = None if to_terminal else Path(options["json"])
    shown: list[CheckResult] = []

    def show(line: "CheckResult") -> None:
        if not shown:
            print(HEAD)
        shown.append(line)
        numbers = f"{line.cases:,}", f"{line.error:.2g}", f"{line.budget:g}", line.unit
        text = ROW.format(line.name, *numbers)
        verdict = "ok" if line.passed else f"FAILS on {line.failed:,}, the smallest {line.failure}"
        print(text, end="  " if len(text) + 2 + len(verdict) <= width() else "\n  ")
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
