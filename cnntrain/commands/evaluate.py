"""`cnntrain evaluate`: how good a trained network is."""

from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from cnntrain import terminal
from cnntrain.commands.app import short
from cnntrain.commands.finished import start_on_run, telling_errors

if TYPE_CHECKING:
    from cnntrain.inference import Evaluation, Trained


SHOWN = 100  # classes in the table; evaluation.json has all


def main() -> None:
    start_on_run("evaluate", load, _evaluate)


def load(cfg: DictConfig) -> "Trained":
    """The network that the options name."""
    from cnntrain.inference import load_trained
    from cnntrain.inference.evaluation import precision_for

    with telling_errors():
        trained = load_trained(
            cfg.run, cfg.checkpoint, backend=cfg.get("backend"), device=cfg.device, root=cfg.root
        )
    precision_for(trained, cfg.precision)
    return trained


def _evaluate(cfg: DictConfig, trained: "Trained") -> None:
    from cnntrain.inference import evaluate_trained

    with telling_errors():
        found = evaluate_trained(trained, split=cfg.split, tta=cfg.tta, precision=cfg.precision)
        # The files first, as whoever reads the table may stop reading.
        files = found.write(Path(HydraConfig.get().runtime.output_dir))
        _show(found)
    print("\n" + "\n".join(short(file) for file in files))


def _show(found: "Evaluation") -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    trained, outcome = found.trained, found.outcome
    flip = ", with the mirror images" if found.tta else ""
    terminal.paragraph(
        f"{found.split} accuracy   {found.accuracy:.2%}   (loss {found.loss:.4f}, "
        f"calibration error {outcome.calibration_error:.2%})\n"
        f"{len(found.images):,} images{flip}, weights of epoch {trained.epoch} "
        f"({short(trained.checkpoint)}), on {trained.backend}\n\n"
    )
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("class")
    for title in ("images", "precision", "recall", "F1", "taken for most often"):
        table.add_column(title, justify="left" if "taken" in title else "right")
    names, taken = trained.data.classes, dict[str, tuple[int, str]]()
    pairs, counts = outcome.confusion.indices().T.tolist(), outcome.confusion.values().tolist()
    for (i, j), count in zip(pairs, counts, strict=True):
        if i != j and count > taken.get(names[i], (0,))[0]:
            taken[names[i]] = count, names[j]
    rows = found.classes
    if len(rows) > SHOWN:
        rows = sorted((r for r in rows if r["images"]), key=lambda r: r["f1"])[:SHOWN]
        print(f"the {len(rows)} classes of {len(names):,} with the lowest F1:")
    for row in rows:
        count, other = taken.get(row["class"], (0, ""))
        other = f"{other} ({count})" if count else ""
        shares = [
            "–" if row[measure] is None else f"{row[measure]:.1%}"
            for measure in ("precision", "recall", "f1")
        ]
        cells = [row["class"], f"{row['images']:,}", *shares, other]
        table.add_row(*(Text(terminal.encodable(cell)) for cell in cells))
    optional = ("precision", "images", "F1", "taken for most often")
    terminal.print_table(table, optional, " or evaluation.json")
