"""`-m`: from a command line to a sweep, on the launcher that Hydra has been given."""

import argparse
import contextlib
import multiprocessing
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra._internal.callbacks import Callbacks
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from cnntrain.commands.app import restart, short
from cnntrain.commands.plan import BASIC_SWEEPER, Plan, places
from cnntrain.config import ConfigError, build, compose_all, config_folders, sweep_folder_problem
from cnntrain.config.errors import format_error
from cnntrain.config.paths import as_if_running
from cnntrain.config.resume import run_options
from cnntrain.interruption import Interrupted, interruption
from cnntrain.sweeps.collect import Collection, collect
from cnntrain.sweeps.member import STOP, MemberTask
from cnntrain.sweeps.members import of_the_run
from cnntrain.sweeps.processes import JobsUntilStopped, prepare_processes, sigint_blocked
from cnntrain.sweeps.sweep import Launch, Outcome, Sweep, Sweeping
from cnntrain.terminal import paragraph

if TYPE_CHECKING:
    from cnntrain.sweeps.searching import Searching

RAY = "hydra_plugins.hydra_ray_launcher.ray_launcher.RayLauncher"
BASIC = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"


class SweepCommand:
    """The sweep of a command line: planned first, with nothing written, and then run."""

    def __init__(self, arguments: argparse.Namespace):
        self.arguments = arguments

    def reject_options(self) -> None:
        problems = [f"{text}: is an option of a sweep; add -m" for text in self._of_sweeps()]
        if problems:
            raise ConfigError(problems)

    def _of_sweeps(self) -> list[str]:
        typed = self.arguments.overrides
        return [text for text in typed if text.lstrip("+~").startswith(("sweep.", "search"))]

    def plan(self, asked: Plan) -> list[DictConfig]:
        """The configs that are still to be run; ConfigError for what cannot be a sweep."""
        cfg, varied = asked.cfgs[0], asked.varied
        searches = bool(cfg.get("search"))
        if not cfg.get("sweep"):
            raise ConfigError(["~sweep: says how -m goes about its members; leave it in"])
        if problems := [*self._misplaced(cfg, varied), *(_searched(varied) if searches else ())]:
            raise ConfigError(problems)
        # Python's own watcher of processes would tell of what a killed one has left to clean up.
        os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker")
        if cfg.hydra.launcher._target_ == BASIC:
            prepare_processes()
        options: Sweep = build(cfg.sweep)
        self.named = options.name is not None or searches
        folder = _folder(cfg, options)
        self.sweeping: Sweeping | Searching
        if searches:
            self.sweeping = self._searching(cfg, folder, options)
            return [run_options(cfg)]
        self.sweeping = Sweeping(folder, options, asked.runs, varied)
        pending = {member.config_hash for member in self.sweeping.pending}
        return [m.run.config for m in self.sweeping.members if m.config_hash in pending]

    def _misplaced(self, cfg: DictConfig, varied: Sequence[str]) -> Iterator[str]:
        for text in self.arguments.overrides:
            if text.lstrip("+~").startswith("hydra.sweep.subdir"):
                yield f"{text}: members are named by what varies; leave it out"
        for key in varied:
            if key.startswith(("sweep.", "search", "resume", "hydra")):
                yield f"{key}: there is one for all members; give it one value"
        if cfg.get("profile"):
            yield "profile=true: is of one run; leave out -m"
        if (sweeper := cfg.hydra.sweeper._target_) != BASIC_SWEEPER:
            yield (
                f"hydra.sweeper._target_={sweeper}: searches are search=<choice> here, by Optuna; "
                "leave the sweeper as it is"
            )

    def _searching(self, cfg: DictConfig, folder: Path, options: Sweep) -> "Searching":
        from cnntrain.sweeps.search import problems
        from cnntrain.sweeps.searching import Searching

        typed: Any = OmegaConf.to_container(cfg.hydra.overrides.task)  # interpolations as typed
        base = of_the_run(typed)
        searchpath = [t for t in self.arguments.overrides if t.startswith("hydra.searchpath=")]

        def compose(overrides: Sequence[str]) -> DictConfig:
            name = self.arguments.config_name or "train"
            return compose_all(overrides, name=name, command="train", **places(self.arguments))

        if found := problems(cfg.search, lambda more: compose([*base, *more]), base):
            raise ConfigError(found)
        options.metric = cfg.search.metric
        at_once = cfg.search.at_once or _at_once(cfg.hydra.launcher)
        return Searching(
            folder,
            options,
            cfg.search,
            seed=cfg.seed,
            base=base,
            command=lambda own: restart(self.arguments, [*searchpath, *own]),
            compose=compose,
            at_once=at_once,
        )

    def run(self) -> None:
        """Run it and tell how it ended; exit code 1 if not all is completed."""
        path = self.sweeping.folder.path
        paragraph(f"sweep {path.name}: {self._size()}; {path}")
        launch = _launch(self.arguments, path)
        found: list[str] = []
        try:
            if isinstance(self.sweeping, Sweeping):
                outcome = self.sweeping.run(launch, paragraph)
            else:
                outcome, found = self.sweeping.run(launch, paragraph)
        except Interrupted as error:
            named = "" if self.named else f" with sweep={path.name}"
            paragraph(
                f"\ninterrupted by {error}; the same command{named} goes on with what is left"
            )
            sys.stderr.flush()
            for worker in multiprocessing.active_children():  # idle ones of joblib
                worker.terminate()
            os._exit(error.exit_code)  # Python's own end takes seconds after the imports
        _end(outcome, found)

    def _size(self) -> str:
        threads = self.sweeping.options.threads
        each = f", {threads} thread{'s' * (threads > 1)} each" if threads else ""
        if not isinstance(self.sweeping, Sweeping):
            return f"{self.sweeping.node.trials} trials, {self.sweeping.at_once} at once{each}"
        total, pending = len(self.sweeping.members), len(self.sweeping.pending)
        already = f", {total - pending} completed before" if pending < total else ""
        return f"{total} members{already}{each}"


def _searched(varied: Sequence[str]) -> Iterator[str]:
    for key in varied:
        yield f"{key}: has several values; a search varies what is in search.space alone"


def _at_once(launcher: DictConfig) -> int:
    """How many trials go side by side where nobody says: as many as joblib has processes; one in
    this process; elsewhere a few, as each round learns from those before it."""
    if launcher._target_ == BASIC:
        return 1
    jobs = launcher.get("n_jobs", 4)
    return jobs if jobs > 0 else max(1, (os.cpu_count() or 1) + 1 + jobs)


def _folder(cfg: DictConfig, options: Sweep) -> Path:
    """Where the sweep is; one without a name is called by its search, or by the time."""
    chosen = options.name if options.name is not None else cfg.hydra.runtime.choices.get("search")
    name = str(chosen) if chosen is not None else f"{datetime.now():%Y-%m-%d_%H-%M-%S}"
    plain = Path(name).name == name and not name.startswith((".", "~"))
    if not name or not plain or len(name.encode()) > 200:
        raise ConfigError(
            [
                f"sweep.name={name}: must be a folder's name; hydra.sweep.dir=<folder> puts the "
                "sweep elsewhere"
            ]
        )
    with open_dict(cfg):
        cfg.sweep.name = name
    with as_if_running(cfg, 0):
        folder = str(cfg.hydra.sweep.dir)
    if problem := sweep_folder_problem(folder):
        raise ConfigError([problem])
    return Path(folder)


def _launch(arguments: argparse.Namespace, folder: Path) -> Launch:
    """Hydra's launcher, whichever it is, as a function of its jobs and of what runs each."""

    def launch(jobs: list[list[str]], task: MemberTask) -> None:
        name = arguments.config_name or "train"
        with config_folders(**places(arguments), name="train"):
            hydra = GlobalHydra.instance().hydra
            assert hydra is not None
            cfg = hydra.compose_config(
                name, arguments.overrides, run_mode=RunMode.MULTIRUN, with_log_configuration=False
            )
            with open_dict(cfg):
                cfg.hydra.sweep.dir = str(folder.absolute())
                cfg.hydra.hydra_logging.root.level = "WARNING"  # the sweep tells what there is
            callbacks = Callbacks(cfg)
            context = HydraContext(config_loader=hydra.config_loader, callbacks=callbacks)
            launcher = Plugins.instance().instantiate_launcher(context, task, cfg)
            callbacks.on_multirun_start(config=cfg, config_name=name)
            if cfg.hydra.launcher._target_ == RAY:
                _join_ray(launcher)
            workers = cfg.hydra.launcher._target_ != BASIC
            with sigint_blocked() if workers else contextlib.nullcontext():
                jobs = JobsUntilStopped(jobs, folder / STOP, workers=workers)
                launcher.launch(jobs, initial_job_idx=0)
            callbacks.on_multirun_end(config=cfg, config_name=name)

    return launch


def _join_ray(launcher: Any) -> None:
    """Start Ray, or join its cluster, ahead of the launcher.

    That would ask for object memory, which a cluster that runs already refuses; and Ray takes over
    the signals.
    """
    import ray

    options: Any = OmegaConf.to_container(launcher.ray_cfg.init, resolve=True)
    ray.init(**{"logging_level": "WARNING", **options})
    interruption.install()


def _draw(collection: Collection) -> None:
    """Write the report. What keeps it from being drawn fails no sweep."""
    try:
        from cnntrain.sweeps.report import write_report

        page, *_ = write_report(collection, collection.folder / "report")
        print(f"\nreport       {short(page)}", flush=True)
    except Exception as error:
        again = shlex.join(["cnntrain", "report", short(collection.folder)])
        print(f"\nreport       not drawn ({format_error(error)}); try again: {again}", flush=True)


def _end(outcome: Outcome, found: Sequence[str]) -> None:
    """The answer, the counts, and what failed."""
    from cnntrain.sweeps.tables import print_ranked

    failed, unfinished = outcome.failed, outcome.unfinished
    collection = collect(outcome.folder.path)
    print_ranked(collection)
    for line in found:  # not wrapped: one of them is a command to be copied
        print(line)
    _draw(collection)
    counts = {"failed": len(failed), "unfinished": len(unfinished)}
    ended = outcome.progress.total - sum(counts.values())
    shown = [f"{ended} {'ended' if found else 'completed'}"]
    paragraph(", ".join([*shown, *(f"{n} {what}" for what, n in counts.items() if n)]))
    if failed or unfinished:
        sys.exit(1)
