"""`cnntrain train`, `python train.py`: one run, or with -m one for every combination."""

import shlex
import sys
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from cnntrain.commands.app import short, start


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
        f"run directory   {short(result.directory)}\n"
        f"TensorBoard     tensorboard --logdir {shlex.quote(short(result.directory))}"
    )
    return result.metrics[cfg.trainer.monitor]
