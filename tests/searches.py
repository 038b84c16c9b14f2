"""Searches for tests: configs with a search in them, trained by an objective that is known."""

import math
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from cnntrain.config import CONF, compose

QUIET = ["data=fashion_mnist_mini", "trainer=cpu", "model=shallow", "trainer.progress_bar=false"]


def conf(folder: Path) -> Path:
    """A copy of conf/ whose root config can be given a search."""
    copy = Path(shutil.copytree(CONF, folder / "conf"))
    root = (copy / "train.yaml").read_text()
    if "- search: null" not in root:
        (copy / "train.yaml").write_text(
            root.replace("  - _self_\n", "  - search: null\n  - _self_\n")
        )
    return copy


def search(folder: Path, *overrides: str, space: dict[str, Any] | None = None) -> DictConfig:
    """The node `search` of a checked config."""
    node = compose(["search=lenet5_lr", *overrides], folder=folder).search
    if space is not None:
        node = OmegaConf.merge(OmegaConf.masked_copy(node, [k for k in node if k != "space"]))
        node.space = space
    return node


def value(values: dict[str, Any]) -> float:
    """An accuracy with its best, 1, at a learning rate of 0.01 and without dropout."""
    lr, dropout = values.get("optimizer.lr", 0.01), values.get("model.dropout", 0.0)
    return 1 - abs(math.log10(lr) + 2) / 4 - dropout / 10


def completed(metric: float) -> dict[str, Any]:
    return {"status": "completed", "metrics": {"val/acc": metric, "val/loss": -math.log(metric)}}


def run_all(study: Any, at_once: int = 1) -> Iterator[Sequence[Any]]:
    """Each round of a search as it is asked for; told when the next one is."""
    while asked := study.ask(at_once):
        yield asked
        study.tell({trial.number: completed(value(trial.values)) for trial in asked})
