"""Run directories and sweep folders made by writing their files."""

import csv
import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from cnntrain.config import compose, config_hash
from cnntrain.config.resume import add_checksum, run_options

COLUMNS = ["epoch", "step", "lr", "train/loss", "train/acc", "val/loss", "val/acc", "grad_norm"]


@cache
def composed(overrides: tuple[str, ...]) -> DictConfig:
    return run_options(compose(list(overrides)))


def write_run(
    directory: Path,
    overrides: Sequence[str] = (),
    *,
    seed: int = 0,
    status: str = "completed",
    val: Sequence[float] = (0.5, 0.8, 0.9),
    metrics: Mapping[str, float] | None = None,
    seconds: float = 10.0,
    error: str | None = None,
) -> None:
    """A run with the validation accuracies `val`, one per epoch, the last one selected."""
    cfg = composed(tuple(overrides)).copy()
    cfg.seed = seed
    (directory / ".hydra").mkdir(parents=True)
    (directory / ".hydra/config.yaml").write_text(OmegaConf.to_yaml(cfg))
    rows = [[i, 10 * i, 0.01, 1 - v, v + 0.01, 1.1 - v, v, 1.0] for i, v in enumerate(val, 1)]
    with (directory / "metrics.csv").open("w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *rows])
    content: dict[str, Any] = {"status": status, "config_hash": config_hash(cfg), "seed": seed}
    if status != "running":
        last = dict(zip(COLUMNS[3:7], rows[-1][3:7], strict=True)) if rows else {}
        content |= {"metrics": last, "epochs": len(rows)}
    if status == "completed":
        content["metrics"] |= {"test/loss": 1.2 - val[-1], "test/acc": val[-1] - 0.01}
        content["metrics"] |= metrics or {}
        content["tested_epoch"] = len(rows)
        content["timings"] = {"seconds": seconds, "images_per_second": 1000.0}
    if error:
        content["error"] = error
    (directory / "result.json").write_text(json.dumps(add_checksum(content)))


def write_sweep(
    folder: Path,
    over: Mapping[str, list[Any]],
    members: Mapping[str, Mapping[str, Any]],
    *,
    metric: str = "val/acc",
    search: Any = None,
) -> None:
    """sweep.json, as a sweep writes it before its first member starts."""
    content = {
        "name": folder.name,
        "metric": metric,
        "over": dict(over),
        "members": {n: {"values": dict(v), "identity": "0"} for n, v in members.items()},
        "search": search,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sweep.json").write_text(json.dumps(content))


def tree(folder: Path) -> dict[str, bytes | None]:
    """The content of every file below a folder, None for folders."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }
