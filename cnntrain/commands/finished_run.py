"""`cnntrain evaluate`, `predict` and `export`: commands on a finished run."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from cnntrain import terminal
from cnntrain.commands.app import exit_with_os_error, short, start
from cnntrain.config import quoted

if TYPE_CHECKING:
    from cnntrain.inference import Evaluation, Prediction, Trained
    from cnntrain.inference.images import ImageSource

MAX_ROWS = 100  # classes in evaluate's table; evaluation.json has all
MAX_LINES = 40  # of predict, without json=true

PATHS = ("run", "checkpoint", "root", "hydra.run.dir")  # options whose value is a path

Loaded = TypeVar("Loaded")


def evaluate() -> None:
    """Accuracy, per-class metrics and mistakes of a trained network."""

    def load(cfg: DictConfig) -> "Trained":
        from cnntrain.inference.evaluation import evaluation_precision

        trained = _load(cfg)
        evaluation_precision(trained, cfg.precision)
        return trained

    def run(cfg: DictConfig, trained: "Trained") -> None:
        from cnntrain.inference import evaluate

        options = {name: cfg[name] for name in ("split", "tta", "precision")}
        with report_errors():
            result = evaluate(trained, **options)
            # Before the table, whose reader may close the pipe.
            files = result.write(_output_folder())
            _print_evaluation(result)
        print("\n" + "\n".join(short(file) for file in files))

    _start("evaluate", load, run)


def predict() -> None:
    """Classes of images, one line each."""

    def load(cfg: DictConfig) -> "tuple[Trained, list[ImageSource]]":
        from cnntrain.inference.images import find_images

        with report_errors():
            files = find_images(cfg.images)
        return _load(cfg), files

    _start("predict", load, lambda cfg, loaded: _predict(cfg, *loaded))


def export() -> None:
    """Write a trained network to an ONNX or torch.export file."""

    def load(cfg: DictConfig) -> "Trained":
        from cnntrain.inference.exporting import check_installed

        check_installed(cfg.format)
        return _load(cfg)

    def run(cfg: DictConfig, trained: "Trained") -> None:
        from cnntrain.inference import export

        with report_errors():
            exported = export(trained, cfg.format, normalise=cfg.normalise, folder=_output_folder())
        print(
            f"loaded again and compared with {trained.backend} on {exported.images} "
            f"{exported.kind} images, in batches of several sizes:\n"
            f"largest difference of a logit   {exported.error:.1e}   (the largest logit is "
            f"{exported.largest:.3g})\n"
            f"same class                      {exported.same} of {exported.images}\n\n"
            f"{short(exported.file)}   ({exported.file.stat().st_size:,} bytes)"
        )

    _start("export", load, run)


def _start(
    name: str, load: Callable[[DictConfig], Loaded], run: Callable[[DictConfig, Loaded], None]
) -> None:
    """`start`, with `load` as its dry run; `run` receives what `load` returns."""
    sys.argv[1:] = map(_with_quoted_paths, sys.argv[1:])
    loaded: list[Loaded] = []

    def dry_run(cfg: DictConfig) -> None:
        loaded.append(load(cfg))

    start(name, lambda cfg: run(cfg, loaded[-1]), dry_run=dry_run, one="run")


def _load(cfg: DictConfig) -> "Trained":
    from cnntrain.inference import load_trained

    backend, device, root = cfg.get("backend"), cfg.get("device", "cpu"), cfg.get("root")
    with report_errors():
        return load_trained(cfg.run, cfg.checkpoint, backend=backend, device=device, root=root)


def _output_folder() -> Path:
    return Path(HydraConfig.get().runtime.output_dir)


def _with_quoted_paths(text: str) -> str:
    """An override with its paths quoted: Hydra's grammar interprets some of their characters.

    Interpolations are not quoted, nor quoted texts and lists that are no existing path.
    """
    name, _, value = text.partition("=")
    exists = os.path.exists(value)
    raw = value not in ("", "null", "???") and value[0] not in "'\"["
    if "${" in value or not (raw or exists):
        return text
    if name == "images":  # a list, separated by commas
        paths = [value] if exists else value.split(",")
        return f"{name}=[{','.join(map(quoted, paths))}]"
    return f"{name}={quoted(value)}" if name in PATHS else text


@contextlib.contextmanager
def report_errors() -> Iterator[None]:
    """Print errors of files, data and networks on one line; exit code 1."""
    try:
        yield
    except Exception as error:
        from cnntrain.data import DataError
        from cnntrain.inference import ExportError
        from cnntrain.training import CheckpointError

        if not isinstance(error, (OSError, CheckpointError, DataError, ExportError)):
            raise
        if HydraConfig.initialized():
            with contextlib.suppress(OSError):  # it is not empty
                os.removedirs(_output_folder())
        if isinstance(error, OSError):
            exit_with_os_error(error)
        print(f"cnntrain: {error}", file=sys.stderr)
        sys.exit(1)


def _print_evaluation(result: "Evaluation") -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    trained, outcome, means = result.trained, result.outcome, result.outcome.class_means
    tta = ", averaged with their horizontal flips" if result.tta else ""
    terminal.paragraph(
        f"{result.split} accuracy   {result.accuracy:.2%}   (loss {result.loss:.4f}, "
        f"calibration error {outcome.calibration_error:.2%})\n"
        f"balanced accuracy {means['balanced_acc']:.2%}, macro F1 {means['macro_f1']:.2%}\n"
        f"{len(result.images):,} images{tta}, weights of epoch {trained.epoch} "
        f"({short(trained.checkpoint)}), on {trained.backend}\n\n"
    )
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("class")
    for title in ("images", "precision", "recall", "F1"):
        table.add_column(title, justify="right")
    table.add_column("most often confused with")
    names, confused = trained.data.classes, dict[str, tuple[int, str]]()
    pairs, counts = (values.tolist() for values in outcome.confusion)
    for (i, j), count in zip(pairs, counts, strict=True):
        if i != j and count > confused.get(names[i], (0,))[0]:
            confused[names[i]] = count, names[j]
    rows = result.classes
    if len(rows) > MAX_ROWS:
        rows = sorted((r for r in rows if r["images"]), key=lambda r: r["f1"])[:MAX_ROWS]
        print(f"the {len(rows)} classes of {len(names):,} with the lowest F1:")
    for row in rows:
        metrics = [row[metric] for metric in ("precision", "recall", "f1")]
        cells = [row["class"], f"{row['images']:,}"]
        cells += ["–" if metric is None else f"{metric:.1%}" for metric in metrics]
        count, other = confused.get(row["class"], (0, ""))
        cells.append(f"{other} ({count})" if count else "")
        table.add_row(*(Text(terminal.encodable(cell)) for cell in cells))
    optional = ("precision", "images", "F1", "most often confused with")
    terminal.print_table(table, optional, " or evaluation.json")


def _predict(cfg: DictConfig, trained: "Trained", files: "list[ImageSource]") -> None:
    from cnntrain.inference.prediction import MAX_DRAWN, draw, predictions

    lines, picture = (_output_folder() / f"predictions.{end}" for end in ("jsonl", "png"))
    picture.unlink(missing_ok=True)  # of an earlier prediction
    drawn: list[Prediction] = []
    count = failed = light = 0  # images; unreadable ones; ones with a light border
    with report_errors(), lines.open("w", encoding="utf-8") as stream:
        for prediction in predictions(trained, files, top=cfg.top, invert=cfg.invert):
            stream.write(prediction.json() + "\n")
            count, failed = count + 1, failed + bool(prediction.error)
            light += prediction.light_border
            if cfg.json:
                print(prediction.json(), flush=True)
            elif not prediction.error and count - failed <= MAX_LINES:
                if count - failed == 1:
                    classes = f"one of {trained.data.num_classes} classes"
                    print(f"{'image':32} {classes}, the most probable first")
                print(prediction_line(prediction), flush=True)
            if prediction.error:
                _warn(f"{terminal.printable(prediction.name)}: {prediction.error}")
            elif len(drawn) < MAX_DRAWN:
                drawn.append(prediction)
        if drawn:
            draw(drawn, picture)
    if not cfg.json:
        more = count - failed - MAX_LINES
        print(f"... and {more:,} more" if more > 0 else "")
        print("\n".join(short(file) for file in (lines, picture) if file.exists()))
    if 2 * light > count:
        _warn(
            f"{light} of {count} images have a light border, but the network was trained with "
            "light objects on a dark background: invert=true is probably missing"
        )
    if failed:
        _warn(f"{failed} of {count} could not be read")
        sys.exit(1)


def _warn(message: str) -> None:
    print(f"cnntrain: {message}", file=sys.stderr)


def prediction_line(prediction: "Prediction") -> str:
    """Name and classes of an image; in a narrow terminal, each on a line of its own."""
    name = terminal.printable(prediction.name)
    classes = [f"{name} {p:.1%}" for name, p in prediction.classes]
    line = f"{name:32} {''.join(f'{text:24}' for text in classes)}".rstrip()
    return line if len(line) <= terminal.width() else "\n  ".join([name, *classes])
