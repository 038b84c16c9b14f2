"""`cnntrain evaluate`: accuracy, per-class metrics and mistakes of a trained network."""

from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from cnntrain import terminal
from cnntrain.commands.app import short
from cnntrain.commands.finished_run import report_errors, start_on_run

if TYPE_CHECKING:
    from cnntrain.inference import Evaluation, Trained


MAX_ROWS = 100  # classes in the table; evaluation.json has all


def main() -> None:
    start_on_run("evaluate", _load, _evaluate)


def _load(cfg: DictConfig) -> "Trained":
    from cnntrain.inference import load_trained
    from cnntrain.inference.evaluation import evaluation_precision

    backend = cfg.get("backend")
    with report_errors():
        trained = load_trained(
            cfg.run, cfg.checkpoint, backend=backend, device=cfg.device, root=cfg.root
        )
    evaluation_precision(trained, cfg.precision)
    return trained


def _evaluate(cfg: DictConfig, trained: "Trained") -> None:
    from cnntrain.inference import evaluate_trained

    with report_errors():
        result = evaluate_trained(trained, split=cfg.split, tta=cfg.tta, precision=cfg.precision)
        # Before the table, whose reader may close the pipe.
        files = result.write(Path(HydraConfig.get().runtime.output_dir))
        _print(result)
    print("\n" + "\n".join(short(file) for file in files))


def _print(result: "Evaluation") -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    trained, outcome = result.trained, result.outcome
    tta = ", averaged with their horizontal flips" if result.tta else ""
    terminal.paragraph(
        f"{result.split} accuracy   {result.accuracy:.2%}   (loss {result.loss:.4f}, "
        f"calibration error {outcome.calibration_error:.2%})\n"
        f"{len(result.images):,} images{tta}, weights of epoch {trained.epoch} "
        f"({short(trained.checkpoint)}), on {trained.backend}\n\n"
    )
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("class")
    for title in ("images", "precision", "recall", "F1"):
        table.add_column(title, justify="right")
    table.add_column("most often confused with")
    names, confused = trained.data.classes, dict[str, tuple[int, str]]()
    pairs, counts = outcome.confusion.indices().T.tolist(), outcome.confusion.values().tolist()
    for (i, j), count in zip(pairs, counts, strict=True):
        if i != j and count > confused.get(names[i], (0,))[0]:
            confused[names[i]] = count, names[j]
    rows = result.classes
    if len(rows) > MAX_ROWS:
        rows = sorted((r for r in rows if r["images"]), key=lambda r: r["f1"])[:MAX_ROWS]
        print(f"the {len(rows)} classes of {len(names):,} with the lowest F1:")
    for row in rows:
        metrics = [row[metric] for metric in ("precision", "recall", "f1")]
        count, other = confused.get(row["class"], (0, ""))
        cells = [
            row["class"],
            f"{row['images']:,}",
            *("–" if metric is None else f"{metric:.1%}" for metric in metrics),
            f"{other} ({count})" if count else "",
        ]
        table.add_row(*(Text(terminal.encodable(cell)) for cell in cells))
    optional = ("precision", "images", "F1", "most often confused with")
    terminal.print_table(table, optional, " or evaluation.json")
