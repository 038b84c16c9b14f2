"""`cnntrain train`, `python train.py`: one run, or with -m one for every combination."""

import argparse
import shlex
import sys
from functools import partial
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from cnntrain.commands.app import command_line, refuse, short, start, told
from cnntrain.commands.plan import places
from cnntrain.config import ConfigError, check, compose, contradictions, fixed_run_directory, quoted
from cnntrain.config.resume import (
    begun,
    changed,
    completed,
    in_use,
    refused_changes,
    run_config,
    without_resume,
)
from cnntrain.interruption import Interrupted, watching


def main() -> None:
    with watching("leave"):
        try:
            resumed = _resumed(command_line())
            start(
                "train",
                lambda cfg: _train(resumed or cfg, resume=resumed is not None),
                rehearse=lambda cfg: _rehearse(resumed or cfg),
                resuming=resumed is not None,
            )
        except ConfigError as error:
            refuse(error)
        except OSError as error:
            print(f"cnntrain: {told(error)}", file=sys.stderr)
            sys.exit(1)
        except Interrupted as error:
            print(f"\ncnntrain: interrupted by {error}", file=sys.stderr)
            sys.exit(error.exit_code)


def _train(cfg: DictConfig, *, resume: bool) -> float:
    from cnntrain.data import DataError
    from cnntrain.training import CheckpointError, NotFinite, train

    directory = Path(HydraConfig.get().runtime.output_dir)
    again = f"resume={shlex.quote(short(directory))}"
    try:
        result = train(cfg, directory, resume=resume)
    except Interrupted as error:
        print(f"\ncnntrain: interrupted by {error}; go on with {again}", file=sys.stderr)
        sys.exit(error.exit_code)
    except NotFinite as error:
        print(f"cnntrain: {error}", file=sys.stderr)
        sys.exit(3)
    except (DataError, CheckpointError) as error:
        print(f"cnntrain: {error}", file=sys.stderr)
        sys.exit(1)
    except OSError as error:
        print(f"cnntrain: {told(error)}; once that is mended, go on with {again}", file=sys.stderr)
        sys.exit(1)
    _show(result.metrics, result.seconds, directory)
    return result.metrics[cfg.trainer.monitor]


def _rehearse(cfg: DictConfig) -> None:
    from cnntrain.training import rehearse

    rehearse(cfg)


def _resumed(arguments: argparse.Namespace) -> DictConfig | None:
    """The config of the run to be continued, if `resume` asks for one that has begun.

    Hydra is then told, by way of the command line, nothing but where that is. A completed run is
    answered with its result, and the process ends.
    """
    given = [text for text in arguments.overrides if text.startswith("resume=")]
    asks = (arguments.help, arguments.hydra_help, arguments.info, arguments.shell_completion)
    chosen = given[-1].partition("=")[2].strip("'\"") if given else "null"
    if chosen == "null" or any(asks) or arguments.cfg:
        return None
    overrides = [text for text in arguments.overrides if text not in given]
    hydra = [text for text in overrides if text.lstrip("+~").startswith("hydra")]
    own = [text for text in overrides if text not in hydra]
    files: dict[str, Any] = {"name": arguments.config_name or "train"} | places(arguments)
    if arguments.multirun:
        raise ConfigError([f"{given[-1]}: continues one run; leave out -m"])
    if chosen == "auto":
        wanted = without_resume(compose(own, **files, command="train"))
        directory = fixed_run_directory(overrides, **files)
        if not begun(directory):
            return None
    else:
        directory = Path(chosen)
        if not chosen or not begun(directory):
            raise ConfigError([f"{given[-1]}: holds no run; name the folder of one, or auto"])
        if placed := [text for text in hydra if text.startswith("hydra.run.dir=")]:
            raise ConfigError([f"{placed[0]}: goes with resume=auto; a run stays where it is"])
        wanted = changed(directory, own, partial(compose, **files, command="train"))
    problems = check(wanted) or contradictions(wanted)
    problems = problems or refused_changes(run_config(directory), wanted)
    if busy := in_use(directory):
        problems.append(busy)
    if problems:
        raise ConfigError(problems)
    if result := completed(directory, wanted):
        print("already completed")
        _show(result["metrics"], result["timings"]["seconds"], directory)
        sys.exit(0)
    placed = [f"hydra.run.dir={quoted(str(directory))}", "hydra.output_subdir=null"]
    others = [text for text in hydra if not text.startswith("hydra.run.dir=")]
    flags = [text for text in sys.argv[1:] if text not in arguments.overrides]
    sys.argv[1:] = [*flags, *others, *placed]
    return wanted


def _show(metrics: dict[str, Any], seconds: float, directory: Path) -> None:
    print(
        f"\ntest accuracy   {metrics['test/acc']:.2%}   (loss "
        f"{metrics['test/loss']:.4f}, {seconds:.0f} s in all)\n"
        f"run directory   {short(directory)}\n"
        f"TensorBoard     tensorboard --logdir {shlex.quote(short(directory))}"
    )
