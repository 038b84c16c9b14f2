"""`cnntrain benchmark`: backends side by side on the layers of a model, on sets, on a shape."""

import os
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from cnntrain.commands.app import short, start
from cnntrain.config import as_config_error, build


def main() -> None:
    # PyTorch's profiler, which measures memory here, else writes about itself to stderr.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    start("benchmark", _benchmark, dry_run=_dry_run)


def _dry_run(cfg: DictConfig) -> None:
    from cnntrain.lab.benchmark.run import prepared

    layers, options = _wanted(cfg)
    prepared(layers, **options)


def _benchmark(cfg: DictConfig) -> None:
    directory = Path(HydraConfig.get().runtime.output_dir)
    from cnntrain.lab.benchmark import benchmark, draw, print_report

    layers, options = _wanted(cfg)
    report = benchmark(layers, **options)
    report.write(directory)
    draw(report, directory / "benchmark.png")
    print_report(report)
    files = [directory / name for name in ("results.csv", "results.json", "benchmark.png")]
    print("\n" + "\n".join(short(file) for file in files))


def _wanted(cfg: DictConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is to be timed, and the other options of `cnntrain.lab.benchmark.benchmark`."""
    options: Any = OmegaConf.to_container(cfg, resolve=True)
    options.pop("model", None)  # the node; `_layers` builds it
    return _layers(cfg, options.pop("layers"), options.pop("shape")), options


def _layers(cfg: DictConfig, sets: dict[str, Any], shape: Any) -> dict[str, Any]:
    """All that is to be timed, by name, as `cnntrain.lab.benchmark.layers.layer_sets` takes it."""
    from torch import nn

    from cnntrain.lab.benchmark.contenders import choice
    from cnntrain.lab.benchmark.layers import layer

    if cfg.get("model"):
        choices = HydraConfig.get().runtime.choices if HydraConfig.initialized() else {}
        name = cfg.model.get("name") or choices.get("model", "model")
        with as_config_error("model"):
            sets[name] = build(cfg.model, conv=nn.Conv2d, in_shape=cfg.in_shape, num_classes=10)
    if shape is not None:
        sets["shape"] = [layer(shape)]
    return sets or choice("layers", "lenet5")
