"""Train convolutional image classifiers from a config that also chooses the convolution."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cnntrain.config import ConfigError, compose
    from cnntrain.inference import evaluate, export, predict
    from cnntrain.training import train

__all__ = ["ConfigError", "compose", "evaluate", "export", "predict", "train"]
__version__ = "0.1.0"

_PACKAGES = dict.fromkeys(__all__, "inference")
_PACKAGES |= {"ConfigError": "config", "compose": "config", "train": "training"}


def __getattr__(name: str) -> Any:
    """Imported at the first use: the command line must not wait for torch."""
    if name not in _PACKAGES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"cnntrain.{_PACKAGES[name]}"), name)
