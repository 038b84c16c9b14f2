"""`cnntrain train`, `python train.py`: one run, or with -m one for every combination."""

import shlex
import sys
from pathlib import Path

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from cnntrain import config
from cnntrain.overrides import combinations


def main() -> None:
    """Check the whole command line, then hand it to Hydra."""
    _check()
    _app()


def _check() -> None:
    """Say everything that is wrong with the command line before anything is written."""
    arguments = get_args_parser().parse_args()
    if arguments.help or arguments.hydra_help or arguments.info or arguments.shell_completion:
        return
    folder = Path(arguments.config_path) if arguments.config_path else config.CONF
    sweep = arguments.multirun or any("hydra.mode=MULTIRUN" in o for o in arguments.overrides)
    runs = combinations(arguments.overrides) if sweep else [arguments.overrides]
    problems = [] if sweep else _occupied(arguments.overrides)
    for overrides in runs:
        try:
            config.compose(
                overrides,
                name=arguments.config_name or "train",
                folder=folder,
                extra=str(Path(arguments.config_dir).absolute()) if arguments.config_dir else "",
            )
        except config.ConfigError as error:
            problems += error.problems
    if problems:
        _refuse(config.ConfigError(problems))


def _occupied(overrides: list[str]) -> list[str]:
    """Hydra writes into a run's directory before the run starts: so ask before Hydra does."""
    given = [o.partition("=")[2].strip("'\"") for o in overrides if o.startswith("hydra.run.dir=")]
    return [config.occupied(path) for path in given if (Path(path) / "result.json").exists()]


@hydra.main(config_path=str(config.CONF), config_name="train", version_base="1.3")
def _app(cfg: DictConfig) -> float | None:
    from cnntrain.data import DataError
    from cnntrain.training import train

    try:
        result = train(cfg, Path(HydraConfig.get().runtime.output_dir))
    except config.ConfigError as error:
        _refuse(error)
    except DataError as error:
        print(f"cnntrain: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("\ncnntrain: interrupted", file=sys.stderr)
        sys.exit(130)
    print(
        f"\ntest accuracy   {result.metrics['test/acc']:.2%}   (loss "
        f"{result.metrics['test/loss']:.4f}, {result.seconds:.0f} s in all)\n"
        f"run directory   {_short(result.directory)}\n"
        f"TensorBoard     tensorboard --logdir {shlex.quote(_short(result.directory))}"
    )
    return result.metrics[cfg.trainer.monitor]


def _short(path: Path) -> str:
    """As one would type it here."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def _refuse(error: config.ConfigError) -> None:
    print("cnntrain: this cannot be run as asked", file=sys.stderr)
    for problem in error.problems:
        print(f"  {problem}", file=sys.stderr)
    sys.exit(2)
