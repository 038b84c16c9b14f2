"""`-m`: from a command line to a sweep, on the launcher that Hydra has been given."""

import argparse
import os
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from hydra._internal.callbacks import Callbacks
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from cnntrain.commands.plan import BASIC_SWEEPER, places
from cnntrain.config import ConfigError, build, searching, sweep_folder_problem
from cnntrain.config.hydra_options import as_if_running
from cnntrain.interruption import Interrupted, interruption
from cnntrain.sweeps.collect import collect
from cnntrain.sweeps.member import MemberTask, prepare_processes
from cnntrain.sweeps.sweep import Launch, Outcome, Sweep, Sweeping

RAY = "hydra_plugins.hydra_ray_launcher.ray_launcher.RayLauncher"
BASIC = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"


class SweepCommand:
    """The sweep of a command line: planned first, with nothing written, and then run."""

    def __init__(self, arguments: argparse.Namespace):
        self.arguments = arguments

    def refuse_options(self) -> None:
        problems = [f"{text}: is an option of a sweep; add -m" for text in self._of_sweeps()]
        if problems:
            raise ConfigError(problems)

    def _of_sweeps(self) -> list[str]:
        typed = self.arguments.overrides
        return [text for text in typed if text.lstrip("+~").startswith(("sweep.", "search"))]

    def plan(self, cfgs: Sequence[DictConfig], varied: Sequence[str]) -> list[DictConfig]:
        """The configs that are still to be run; ConfigError for what cannot be a sweep."""
        problems = [
            f"{text}: members are named by what varies; leave it out"
            for text in self.arguments.overrides
            if text.lstrip("+~").startswith("hydra.sweep.subdir")
        ]
        if cfgs[0].get("search"):
            problems.append("search: is not connected to -m yet; leave it out")
        problems += [
            f"{key}: there is one for all members; give it one value"
            for key in varied
            if key.startswith(("sweep.", "search", "resume"))
        ]
        if (sweeper := cfgs[0].hydra.sweeper._target_) != BASIC_SWEEPER:
            problems.append(
                f"hydra.sweeper._target_={sweeper}: searches are search=<choice> here, by Optuna; "
                "leave the sweeper as it is"
            )
        if problems:
            raise ConfigError(problems)
        # Python's own watcher of processes would tell of what a killed one has left to clean up.
        os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker")
        if cfgs[0].hydra.launcher._target_ == BASIC:
            prepare_processes()
        options: Sweep = build(cfgs[0].sweep)
        self.sweeping = Sweeping(_folder(cfgs[0], options), options, cfgs, varied)
        pending = {member.config_hash for member in self.sweeping.pending}
        return [m.config for m in self.sweeping.members if m.config_hash in pending]

    def run(self) -> None:
        """Run it and tell how it ended; exit code 1 if not all is completed."""
        sweeping = self.sweeping
        total, pending = len(sweeping.members), len(sweeping.pending)
        already = f", {total - pending} completed before" if pending < total else ""
        threads = sweeping.options.threads
        each = f", {threads} thread{'s' * (threads > 1)} each" if threads else ""
        path = sweeping.folder.path
        print(f"sweep {path.name}: {total} members{already}{each}; {path}", flush=True)
        try:
            outcome = sweeping.run(_launch(self.arguments, path), _say)
        except Interrupted as error:
            _say(f"\ninterrupted by {error}; the same command goes on with what is left")
            sys.exit(error.exit_code)
        _end(outcome)


def _folder(cfg: DictConfig, options: Sweep) -> Path:
    """Where the sweep is; one without a name is called by the time."""
    name = str(options.name) if options.name is not None else f"{datetime.now():%Y-%m-%d_%H-%M-%S}"
    if Path(name).name != name or name.startswith("~") or len(name.encode()) > 200:
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
        with searching(**places(arguments), name="train"):
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


def _say(text: str) -> None:
    print(text, flush=True)


def _end(outcome: Outcome) -> None:
    """The counts, what failed, and the answer."""
    from rich.console import Console

    from cnntrain.sweeps.tables import ranked_table

    failed, unfinished = outcome.failed, outcome.unfinished
    console = Console()
    Console(width=max(console.width, 110)).print(ranked_table(collect(outcome.folder.path)))
    for name, error in failed.items():
        _say(f"failed: {name}: {error}")
    counts: dict[str, Any] = {
        "completed": outcome.progress.total - len(failed) - len(unfinished),
        "failed": len(failed),
        "unfinished": len(unfinished),
    }
    _say(", ".join(f"{number} {what}" for what, number in counts.items() if number))
    if failed or unfinished:
        sys.exit(1)
