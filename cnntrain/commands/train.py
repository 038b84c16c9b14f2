"""`cnntrain train`, `python train.py`: one run, or with -m one for every combination."""

import shlex
import sys
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from cnntrain.commands.app import start


def main() -> None:
    start("train", _train)


def _train(cfg: DictConfig) -> float:
    from cnntrain.data import DataError
    from cnntrain.training import train

    try:
        result = train(cfg, Path(HydraConfig.get().runtime.output_dir))
    except DataError as error:
        print(f"cnntrain: {error}", file=sys.stderr)
        sys.exit(1)
    print(
        f"\ntest accuracy   {result.metrics['test/acc']:.2%}   (loss "
        f"{result.metrics['test/loss']:.4f}, {result.seconds:.0f} s in all)\n"
        f"run directory   {_short(result.directory)}\n"
        f"TensorBoard     tensorboard --logdir {shlex.quote(_short(result.directory))}"
    )
    return result.metrics[cfg.trainer.monitor]


def _short(path: Path) -> str:
    """As one would type it where the command was typed."""
    here = Path(HydraConfig.get().runtime.cwd)
    return str(path.relative_to(here) if path.is_relative_to(here) else path)
