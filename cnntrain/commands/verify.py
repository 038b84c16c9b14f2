"""`cnntrain verify`: one line per check of a backend, then the verdict."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from cnntrain.commands.app import start
from cnntrain.config import ConfigError, build, writable

if TYPE_CHECKING:
    from cnntrain.lab.verify import Line

ROW = "{:36}{:>6}  {:>11}  {:>8} {:9}  {}"


def main() -> None:
    start("verify", _verify, rehearse=_rehearse, one="backend")


def _rehearse(cfg: DictConfig) -> None:
    """A report that cannot be written is not to be found out a minute later."""
    if cfg.json in (None, "-"):
        return
    path = Path(cfg.json)
    if len(path.name.encode()) > 255 or (path.parent.is_dir() and not writable(path.parent)):
        raise ConfigError([f"json={path}: cannot be written; name a file in a folder of yours"])


def _verify(cfg: DictConfig) -> None:
    from cnntrain.lab.verify import verify

    options: dict[str, Any] = {str(key): cfg[key] for key in cfg if key != "backend"}
    to_terminal = options["json"] == "-"
    if options["json"] is not None:
        options["json"] = None if to_terminal else Path(options["json"])
    shown: list[Line] = []

    def show(line: "Line") -> None:
        if not shown:
            print(ROW.format("check", "cases", "worst error", "budget", "unit", "").rstrip())
        shown.append(line)
        said = "ok" if line.passed else f"FAILS on {line.failed:,}, first {line.failure}"
        numbers = f"{line.cases:,}", f"{line.error:.2g}", f"{line.budget:g}", line.unit
        print(ROW.format(line.name, *numbers, said), flush=True)

    found = verify(build(cfg.backend), **{**options, "report": None if to_terminal else show})
    print(found.json() if to_terminal else f"\n{found.summary()}")
    if not found.passed:
        sys.exit(1)
