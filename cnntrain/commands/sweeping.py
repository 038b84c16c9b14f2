"""`-m`: a sweep or search from a command line, on one of Hydra's launchers."""

import argparse
import multiprocessing
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from cnntrain.commands.app import restart, short
from cnntrain.commands.plan import Plan, is_basic, places
from cnntrain.config import ConfigError, build, compose_all, config_folders, run_directory_problem
from cnntrain.config.composition import as_if_running
from cnntrain.config.errors import format_error
from cnntrain.config.hydra_compat import Callbacks
from cnntrain.config.resume import run_options
from cnntrain.interruption import Interrupted, interruption
from cnntrain.sweeps import processes
from cnntrain.sweeps.members import ComposedRun
from cnntrain.sweeps.records import collect
from cnntrain.sweeps.sweep import GridSweep, Sweep, SweepRunner
from cnntrain.terminal import paragraph

RAY = "hydra_plugins.hydra_ray_launcher.ray_launcher.RayLauncher"


class SweepCommand:
    """The sweep of a command line, for `app.start`. Raises ConfigError."""

    def __init__(self, arguments: argparse.Namespace, planned: Plan):
        self.arguments, self.cfg = arguments, planned.cfgs[0]
        cfg = self.cfg
        if not cfg.get("sweep"):
            raise ConfigError(["~sweep: has the options of the sweep; leave it in"])
        if problems := list(self._problems(cfg, planned.varied)):
            raise ConfigError(problems)
        # multiprocessing's resource tracker warns of what killed processes leave behind.
        os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker")
        if is_basic(cfg.hydra.launcher):
            processes.start_server()
        options: Sweep = build(cfg.sweep)
        folder = _folder(cfg, options)
        self.sweep: Any
        if cfg.get("search"):
            self.sweep = self._search(cfg, folder, options)
            self.configs = [run_options(cfg)]
        else:
            runs = list(map(ComposedRun.of, planned.cfgs))
            self.sweep = GridSweep(folder, options, runs, planned.varied)
            self.configs = [member.run.config for member in self.sweep.pending]

    def run(self) -> None:
        """Run the sweep and print the ranking; exit code 1 if not all members are completed."""
        path, threads = self.sweep.folder.path, self.sweep.options.threads
        each = f", {threads} thread{'s' * (threads > 1)} each" if threads else ""
        paragraph(f"sweep {path.name}: {self.sweep.size}{each}; {path}")
        try:
            self.sweep.run(self._launch)
        except Interrupted as error:
            unnamed = self.sweep.options.name is None and not self.sweep.folder.search
            named = f" with sweep={path.name}" if unnamed else ""
            paragraph(f"\ninterrupted by {error}; the same command{named} resumes what is left")
            sys.stderr.flush()
            for worker in multiprocessing.active_children():  # idle ones of joblib
                worker.terminate()
            os._exit(error.exit_code)  # the interpreter's shutdown would take seconds
        _finish(self.sweep)

    def _launch(self, jobs: list[list[str]], task: processes.MemberTask) -> None:
        """Run jobs of this task function on Hydra's configured launcher."""
        cfg, folder = self.cfg, self.sweep.folder.path
        with config_folders(**places(self.arguments), name="train"):
            with open_dict(cfg):
                cfg.hydra.mode = RunMode.MULTIRUN
                cfg.hydra.sweep.dir = str(folder.absolute())
                cfg.hydra.hydra_logging.root.level = "WARNING"
            callbacks, name = Callbacks(cfg), cfg.hydra.job.config_name
            context = HydraContext(GlobalHydra.instance().config_loader(), callbacks)
            launcher = Plugins.instance().instantiate_launcher(context, task, cfg)
            callbacks.on_multirun_start(config=cfg, config_name=name)
            if cfg.hydra.launcher._target_ == RAY:
                _init_ray(launcher)
            with processes.sigint_blocked():  # other threads receive it
                jobs = processes.InterruptibleJobs(jobs, folder / processes.STOP_FILE)
                launcher.launch(jobs, initial_job_idx=0)
            callbacks.on_multirun_end(config=cfg, config_name=name)

    def _problems(self, cfg: DictConfig, varied: Sequence[str]) -> Iterator[str]:
        for text in self.arguments.overrides:
            if text.lstrip("+~").startswith("hydra.sweep.subdir"):
                yield f"{text}: members are named by what varies; leave it out"
        for key in varied:
            if key.startswith(("sweep.", "search", "resume", "hydra")):
                yield f"{key}: is the same for all members; give it one value"
            if cfg.get("search"):
                yield f"{key}: has several values; a search varies what is in search.space alone"
        if cfg.get("profile"):
            yield "profile=true: is for a single run; leave out -m"
        if not is_basic(cfg.hydra.sweeper):
            yield "hydra/sweeper: is not supported; leave it out, and search with search=<choice>"

    def _search(self, cfg: DictConfig, folder: Path, options: Sweep) -> SweepRunner:
        from cnntrain.sweeps.search_sweep import SearchSweep, search_problems

        base = ComposedRun.of(cfg).typed
        name = self.arguments.config_name or "train"
        searchpath = [t for t in self.arguments.overrides if t.startswith("hydra.searchpath=")]

        def compose(own: Sequence[str]) -> DictConfig:
            overrides = [*base, *own]
            return compose_all(overrides, name=name, command="train", **places(self.arguments))

        if found := search_problems(cfg.search, compose, base):
            raise ConfigError(found)
        options.metric = cfg.search.metric
        at_once = cfg.search.at_once or _at_once(cfg.hydra.launcher)

        def command(own: Sequence[str]) -> str:
            return restart(self.arguments, [*searchpath, *base, *own])

        return SearchSweep(folder, options, cfg, command, compose, at_once)


def _at_once(launcher: DictConfig) -> int:
    """Default number of trials per round: 1 in this process, joblib's processes, else 4."""
    if is_basic(launcher):
        return 1
    jobs = launcher.get("n_jobs", 4)
    return jobs if jobs > 0 else max(1, (os.cpu_count() or 1) + 1 + jobs)


def _folder(cfg: DictConfig, options: Sweep) -> Path:
    """The sweep's folder; without a name it is named after the search, or the time."""
    default = cfg.hydra.runtime.choices.get("search") or f"{datetime.now():%Y-%m-%d_%H-%M-%S}"
    name = str(default if options.name is None else options.name)
    if Path(name).name != name or name[:1] in ("", ".", "~") or len(name.encode()) > 200:
        elsewhere = "hydra.sweep.dir=<folder> puts the sweep elsewhere"
        raise ConfigError([f"sweep.name={name}: must be a folder's name; {elsewhere}"])
    with open_dict(cfg):
        cfg.sweep.name = name
    with as_if_running(cfg, 0):
        folder = str(cfg.hydra.sweep.dir)
    if problem := run_directory_problem(folder, "hydra.sweep.dir", ["result.json"]):
        raise ConfigError([problem])
    return Path(folder)


def _init_ray(launcher: Any) -> None:
    """Initialise Ray ahead of the launcher, whose object memory a running cluster would reject."""
    import ray

    options: Any = OmegaConf.to_container(launcher.ray_cfg.init, resolve=True)
    ray.init(**{"logging_level": "WARNING", **options})
    interruption.install()  # Ray has replaced the handlers


def _finish(runner: SweepRunner) -> None:
    """Print the ranking, the summary of a search and the counts; write the report."""
    from cnntrain.sweeps.tables import print_ranked

    collection = collect(runner.folder.path)
    print_ranked(collection)
    for line in runner.summary:  # not wrapped: one is a command to be copied
        print(line)
    try:
        from cnntrain.sweeps.report import write_report

        page, *_ = write_report(collection, collection.folder / "report")
        print(f"\nreport       {short(page)}", flush=True)
    except Exception as error:  # does not fail the sweep
        again = shlex.join(["cnntrain", "report", short(collection.folder)])
        print(f"\nreport       not written ({format_error(error)}); try again: {again}", flush=True)
    counts = {"failed": len(runner.failed), "unfinished": len(runner.waiting)}
    ended = runner.total - sum(counts.values())
    parts = [f"{ended} {'ended' if runner.summary else 'completed'}"]
    paragraph(", ".join([*parts, *(f"{n} {status}" for status, n in counts.items() if n)]))
    if any(counts.values()):
        sys.exit(1)
