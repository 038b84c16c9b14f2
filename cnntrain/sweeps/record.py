"""What a run's directory says of the run, without torch: how far it has come, what it measured."""

import csv
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cnntrain.config.resume import RESULT, DamagedRecord, has_run, is_running, read_sealed

METRICS = ("val/acc", "val/loss", "test/acc", "test/loss", "train/acc", "train/loss")
STATUSES = ("completed", "running", "pending", "interrupted", "pruned", "failed", "damaged")


@dataclass(frozen=True)
class Member:
    """A run of a sweep, or one that is planned.

    `values` are those of the options that vary, and the seed; `metrics` losses in nats and
    accuracies from 0 to 1: of the chosen epoch if it is completed, else of the last.
    """

    name: str  # of its directory, seen from the folder
    directory: Path
    values: dict[str, Any]
    status: str
    metrics: dict[str, float] = field(default_factory=dict)
    seconds: float | None = None
    error: str | None = None
    epochs: int = 0
    config_hash: str | None = None


def read_member(name: str, directory: Path, values: dict[str, Any]) -> Member:
    """What a directory says of its run; one that has not begun is pending."""
    try:
        result = read_sealed(directory / RESULT)
    except FileNotFoundError:
        status = "running" if is_running(directory) else "pending"
        if status == "pending" and has_run(directory):
            status = "interrupted"  # before it could say so
        result = {"status": status}
    except (DamagedRecord, OSError) as error:
        return Member(name, directory, values, "damaged", error=str(error).split("; ")[0])
    status = result["status"]
    if status == "running" and not is_running(directory):
        status = "interrupted"  # by what cannot be caught
    metrics, epochs = result.get("metrics"), result.get("epochs")
    if metrics is None and (rows := history(directory)):
        metrics, epochs = {k: v for k, v in rows[-1].items() if k in METRICS}, len(rows)
    if "seed" not in values and "seed" in result:
        values["seed"] = result["seed"]
    seconds = result.get("timings", {}).get("seconds")
    return Member(
        name, directory, values, status, metrics or {}, seconds,
        result.get("error"), epochs or 0, result.get("config_hash"),
    )  # fmt: skip


def history(directory: Path) -> list[dict[str, float]]:
    """The rows of metrics.csv, an epoch each from 1, without what is missing or no number.

    A row that is half written, as of a run that is at work, is left out. Epochs of earlier versions
    count from 0 there.
    """
    rows: list[dict[str, float]] = []
    try:
        with (directory / "metrics.csv").open(newline="", encoding="utf-8") as file:
            row: dict[Any, Any]
            for row in csv.DictReader(file):
                numbers = {k: n for k, v in row.items() if (n := _number(v)) is not None and k}
                if "epoch" in numbers and None not in row.values():
                    rows.append(numbers)
    except (OSError, UnicodeDecodeError, csv.Error):
        pass
    if rows and rows[0]["epoch"] == 0:
        rows = [row | {"epoch": row["epoch"] + 1} for row in rows]
    return rows


def plain(value: Any) -> str:
    """A value as one types it: `true`, `null`, `[6,16,128]`, `0.01`."""
    return (
        value if isinstance(value, str) else json.dumps(value, separators=(",", ":"), default=str)
    )


def _number(text: Any) -> float | None:
    try:
        return float(text)
    except (TypeError, ValueError):
        return None
