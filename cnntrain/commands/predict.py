"""`cnntrain predict`: classes of images, one line each."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from cnntrain.commands.app import printable, short
from cnntrain.commands.finished_run import report_errors, start_on_run
from cnntrain.config import ConfigError
from cnntrain.terminal import width

if TYPE_CHECKING:
    from cnntrain.inference import Prediction, Trained
    from cnntrain.inference.images import ImageSource

MAX_LINES = 40  # without json=true


def main() -> None:
    start_on_run("predict", _load, _predict, path_lists=["images"])


def _load(cfg: DictConfig) -> "tuple[Trained, list[ImageSource]]":
    from cnntrain.inference import load_trained
    from cnntrain.inference.images import find_images

    if not isinstance(cfg.json, bool):
        raise ConfigError([f"json={cfg.json}: input should be true or false"])
    with report_errors():
        files = find_images(cfg.images)
        backend = cfg.get("backend")
        return load_trained(cfg.run, cfg.checkpoint, backend=backend, device=cfg.device), files


def _predict(cfg: DictConfig, loaded: "tuple[Trained, list[ImageSource]]") -> None:
    from cnntrain.inference.prediction import MAX_DRAWN, draw, predictions

    trained, files = loaded
    folder = Path(HydraConfig.get().runtime.output_dir)
    lines, picture = folder / "predictions.jsonl", folder / "predictions.png"
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
                print(
                    f"cnntrain: {printable(prediction.name)}: {prediction.error}", file=sys.stderr
                )
            elif len(drawn) < MAX_DRAWN:
                drawn.append(prediction)
        if drawn:
            draw(drawn, picture)
    if not cfg.json:
        more = count - failed - MAX_LINES
        print(f"... and {more:,} more" if more > 0 else "")
        print("\n".join(short(file) for file in (lines, picture) if file.exists()))
    if 2 * light > count:
        print(
            f"cnntrain: {light} of {count} images have a light border, but the network was trained "
            "with light objects on a dark background: invert=true is probably missing",
            file=sys.stderr,
        )
    if failed:
        print(f"cnntrain: {failed} of {count} could not be read", file=sys.stderr)
        sys.exit(1)


def prediction_line(prediction: "Prediction") -> str:
    """Name and classes of an image; in a narrow terminal, each on a line of its own."""
    name = printable(prediction.name)
    classes = [f"{name} {p:.1%}" for name, p in prediction.classes]
    line = f"{name:32} {''.join(f'{text:24}' for text in classes)}".rstrip()
    return line if len(line) <= width() else "\n  ".join([name, *classes])
