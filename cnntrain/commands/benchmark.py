"""`cnntrain benchmark`: time backends on the layers of a model, on layer sets, on one shape."""

import os
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from cnntrain.commands.app import short, start
from cnntrain.config import as_config_error, build
from cnntrain.config.options import defaults


def main() -> None:
    # Otherwise PyTorch's profiler, which measures memory, logs to stderr.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    start("benchmark", _benchmark, dry_run=_dry_run)


def _dry_run(cfg: DictConfig) -> None:
    from cnntrain.lab.benchmark.run import prepare

    layers, options = _arguments(cfg)
    prepare(layers, **options)


def _benchmark(cfg: DictConfig) -> None:
    directory = Path(HydraConfig.get().runtime.output_dir)
    from cnntrain.lab.benchmark import benchmark, plot, print_report

    layers, options = _arguments(cfg)
    report = benchmark(layers, **options)
    report.write(directory)
    plot(report, directory / "benchmark.png")
    print_report(report)
    files = [directory / name for name in ("results.csv", "results.json", "benchmark.png")]
    print("\n" + "\n".join(short(file) for file in files))


def _arguments(cfg: DictConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """The layer sets and the other arguments of `cnntrain.lab.benchmark.benchmark`."""
    from torch import nn

    from cnntrain.lab.benchmark.layers import layer

    options: Any = OmegaConf.to_container(cfg, resolve=True)
    options.pop("model", None)
    sets, shape = options.pop("layers"), options.pop("shape")
    if cfg.get("model"):
        choices = HydraConfig.get().runtime.choices if HydraConfig.initialized() else {}
        name = cfg.model.get("name") or choices.get("model", "model")
        with as_config_error("model"):
            sets[name] = build(cfg.model, conv=nn.Conv2d, in_shape=cfg.in_shape, num_classes=10)
    if shape is not None:
        sets["shape"] = [layer(shape)]
    return sets or defaults("layers", "lenet5"), options
