"""`cnntrain verify`: one line per check of a backend, then the verdict."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from cnntrain.commands.app import start
from cnntrain.config import build

if TYPE_CHECKING:
    from cnntrain.lab.verify import Line

ROW = "{:36}{:>6}  {:>12}  {:>8}   {}"


def main() -> None:
    if {"-m", "--multirun", "hydra.mode=MULTIRUN"} & set(sys.argv):
        print("cnntrain: -m: verify takes one backend; start it once for each", file=sys.stderr)
        sys.exit(2)
    start("verify", _verify)


def _verify(cfg: DictConfig) -> None:
    from cnntrain.lab.verify import verify

    options: dict[str, Any] = {str(key): cfg[key] for key in cfg if key != "backend"}
    to_terminal = options["json"] == "-"
    if options["json"] is not None:
        options["json"] = None if to_terminal else Path(options["json"])
    shown: list[Line] = []

    def show(line: "Line") -> None:
        if not shown:
            print(ROW.format("check", "cases", "worst error", "budget", "").rstrip())
        shown.append(line)
        said = "ok" if line.passed else f"FAILS on {line.failed:,}, first {line.failure}"
        numbers = f"{line.cases:,}", f"{line.error:.2g}", f"{line.budget:g}"
        print(ROW.format(line.name, *numbers, said), flush=True)

    found = verify(build(cfg.backend), **{**options, "report": None if to_terminal else show})
    failed = sum(not line.passed for line in found.lines)
    verdict = f"fails {failed} of {len(found.lines)} checks" if failed else "passes every check"
    print(found.json() if to_terminal else f"\n{found.backend} {verdict} ({found.seconds:.0f} s)")
    if failed:
        sys.exit(1)
