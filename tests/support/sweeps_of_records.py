"""Sweeps for tests whose members are not trained: a launcher writes down how each ended."""

import csv
import json
import re
from pathlib import Path
from typing import Any

from hydra._internal.utils import get_args_parser
from omegaconf import OmegaConf
from run_folders import write_run

from cnntrain.commands.plan import plan
from cnntrain.sweeps.members import Planned
from cnntrain.sweeps.sweep import Outcome, Sweep, Sweeping

COMPARE = ["model=shallow,lenet5", "seed=0,1"]


def asked(*typed: str) -> Any:
    """What a command line with -m asks for."""
    return plan(get_args_parser().parse_intermixed_args(["-m", *typed]), "train")


def sweeping(folder: Path, *typed: str, **options: Any) -> Sweeping:
    found = asked(*typed)
    return Sweeping(folder, Sweep(**options), found.runs, found.varied)


class Launcher:
    """In a real one's place: each job is a record that says how it ended, or does nothing."""

    def __init__(self, of: Sweeping, *, failing: tuple[str, ...] = (), silent: bool = False):
        self.members = {member.name: member for member in of.pending}
        self.of, self.failing, self.silent, self.launched = of, failing, silent, list[str]()

    def __call__(self, jobs: list[list[str]], task: Any) -> None:
        for *_, directory in jobs:
            called = re.fullmatch(r"hydra\.sweep\.subdir='?([^']+)'?", directory)
            assert called is not None
            self.launched.append(called[1])
            if not self.silent:
                self.record(self.members[called[1]])

    def record(self, member: Planned) -> None:
        directory = self.of.folder.directory(member.name)
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


def run(folder: Path, *typed: str, **how: Any) -> tuple[Outcome, Launcher, list[str]]:
    """The sweep on a launcher of records; with what it said."""
    under_way = sweeping(folder, *typed)
    launcher, said = Launcher(under_way, **how), list[str]()
    return under_way.run(launcher, said.append), launcher, said


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "sweep.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def sheet(folder: Path) -> Any:
    return OmegaConf.to_container(OmegaConf.load(folder / "sweep.yaml"))
