"""Sweeps for tests whose members are not trained: a launcher writes their records."""

import csv
import json
import re
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

from run_folders import write_run

from cnntrain.commands.app import command_line
from cnntrain.commands.plan import plan
from cnntrain.sweeps.members import ComposedRun, PlannedMember
from cnntrain.sweeps.sweep import GridSweep, Sweep

COMPARE = ["model=shallow,lenet5", "seed=0,1"]


def planned(*typed: str) -> tuple[list[ComposedRun], list[str]]:
    """The runs of a command line with -m, and the options that vary."""
    with patch.object(sys, "argv", ["cnntrain train", "-m", *typed]):
        found = plan(command_line(), "train")
    return list(map(ComposedRun.of, found.cfgs)), found.varied


def sweeping(folder: Path, *typed: str, **options: Any) -> GridSweep:
    runs, varied = planned(*typed)
    return GridSweep(folder, Sweep(**options), runs, varied)


class Launcher:
    """A launcher that writes each job's record, or nothing."""

    def __init__(self, of: GridSweep, *, failing: tuple[str, ...] = (), silent: bool = False):
        self.members = {member.name: member for member in of.pending}
        self.of, self.failing, self.silent, self.launched = of, failing, silent, list[str]()

    def __call__(self, jobs: list[list[str]], task: Any) -> None:
        for *_, directory in jobs:
            called = re.fullmatch(r"hydra\.sweep\.subdir='?([^']+)'?", directory)
            assert called is not None
            self.launched.append(called[1])
            if not self.silent:
                self.write(self.members[called[1]])

    def write(self, member: PlannedMember) -> None:
        directory = self.of.folder.path / member.name
        failed = member.name in self.failing
        typed = [text for text in member.run.typed if not text.startswith("seed=")]
        write_run(
            directory,
            typed,
            seed=member.run.config.seed,
            status="failed" if failed else "completed",
            error="OSError: no room" if failed else None,
        )
        content = json.loads((directory / "result.json").read_text())
        assert content["config_hash"] == member.config_hash


def run(folder: Path, *typed: str, **how: Any) -> tuple[GridSweep, Launcher, list[str]]:
    """Run the sweep on a Launcher; returns the printed lines as well."""
    sweep = sweeping(folder, *typed)
    launcher, printed = Launcher(sweep, **how), list[str]()
    with patch("cnntrain.sweeps.sweep.paragraph", printed.append):
        sweep.run(launcher)
    return sweep, launcher, printed


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "sweep.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def record(folder: Path) -> Any:
    return json.loads((folder / "sweep.json").read_text())
