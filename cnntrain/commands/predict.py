"""`cnntrain predict`: what is on pictures, a line for each."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from cnntrain.commands.app import printable, short
from cnntrain.commands.finished import start_on_run, telling_errors
from cnntrain.config import ConfigError
from cnntrain.terminal import width

if TYPE_CHECKING:
    from cnntrain.inference import Prediction, Trained

SHOWN = 40  # lines for people


def main() -> None:
    start_on_run("predict", _load, _predict, several=["images"])


def _load(cfg: DictConfig) -> "tuple[Trained, list[Path]]":
    from cnntrain.inference import load_trained
    from cnntrain.inference.prediction import files

    if not isinstance(cfg.json, bool):
        raise ConfigError([f"json={cfg.json}: input should be true or false"])
    with telling_errors():
        found = files(cfg.images)
        backend = cfg.get("backend")
        return load_trained(cfg.run, cfg.checkpoint, backend=backend, device=cfg.device), found


def _predict(cfg: DictConfig, loaded: "tuple[Trained, list[Path]]") -> None:
    from cnntrain.inference.prediction import DRAWN, draw, predictions

    trained, files = loaded
    folder = Path(HydraConfig.get().runtime.output_dir)
    lines, grid = folder / "predictions.jsonl", folder / "predictions.png"
    grid.unlink(missing_ok=True)  # of an earlier one
    found: list[Prediction] = []  # those that are drawn
    count = failed = 0
    light: list[str] = []  # those that probably want invert=true
    with telling_errors(), lines.open("w", encoding="utf-8") as stream:
        options = {"top": cfg.top, "invert": cfg.invert, "max_pixels": cfg.max_pixels}
        for one in predictions(trained, files, **options):
            stream.write(one.json() + "\n")
            count, failed = count + 1, failed + bool(one.error)
            light += [one.name] if one.dark_on_light else []
            if cfg.json:
                print(one.json(), flush=True)
            elif not one.error and count - failed <= SHOWN:
                if count - failed == 1:
                    classes = f"one of {trained.data.num_classes} classes"
                    print(f"{'picture':32} {classes}, the most probable first")
                print(_line(one), flush=True)
            if one.error:
                print(f"cnntrain: {printable(one.name)}: {one.error}", file=sys.stderr)
            elif len(found) < DRAWN:
                found.append(one)
        if found:
            draw(found, grid)
    if not cfg.json:
        more = count - failed - SHOWN
        print(f"... and {more:,} more" if more > 0 else "")
        print("\n".join(short(file) for file in (lines, grid) if file.exists()))
    if light:
        print(
            f"cnntrain: {printable(light[0])}{_others(len(light) - 1)} lighter at the border than "
            "in the middle, and the network was trained on light objects on a dark ground: "
            "invert=true is probably missing",
            file=sys.stderr,
        )
    if failed:
        print(f"cnntrain: {failed} of {count} could not be read", file=sys.stderr)
        sys.exit(1)


def _others(more: int) -> str:
    return f" and {more:,} more are" if more else " is"


def _line(one: "Prediction") -> str:
    """A picture's name and its classes: in a line, or in a narrow terminal in one each."""
    name, classes = printable(one.name), [f"{name} {share:.1%}" for name, share in one.classes]
    line = f"{name:32} {''.join(f'{text:24}' for text in classes)}".rstrip()
    return line if len(line) <= width() else "\n  ".join([name, *classes])
