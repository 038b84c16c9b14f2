"""The README's pictures that are taken in a real browser.

    python scripts/make_pictures.py --sweep outputs/sweeps/compare --run outputs/mine

Of a sweep its report and its HParams tab, of a run what TensorBoard shows of it. Needs Chromium and
its driver (Debian: chromium, chromium-driver) and selenium.
"""

import argparse
import shutil
import tempfile
import time
from pathlib import Path

from browser import Browser
from tensorboard_page import Board, Server

PICTURES = Path(__file__).parent / "pictures"


def report(sweep: Path, height: int) -> None:
    """The upper part of the page that `cnntrain report` has written."""
    page = (sweep / "report/report.html").absolute().as_uri()
    with Browser(PICTURES, (1200, height)) as browser:
        browser.name = "report"
        browser.load(page)
        browser.shot()


def hparams(sweep: Path) -> None:
    """TensorBoard's HParams tab over the sweep's folder."""
    with Server(sweep) as address, Board(address, shots=PICTURES, size=(1400, 700)) as board:
        board.open("hparams")
        time.sleep(15)  # it reads the event files
        board.open("hparams")
        time.sleep(5)
        board.shot()


def tabs(run: Path) -> None:
    """What TensorBoard shows of a run."""
    with tempfile.TemporaryDirectory() as folder:
        shots = Path(folder)
        with Server(run) as address, Board(address, shots=shots, size=(1200, 800)) as board:
            board.tabs({"projector", "images", "graphs", "custom_scalars"})
            board.custom_scalars({"loss": 2, "accuracy": 2})
            board.shot()
            board.open("images", "^(features|kernels|val/mistakes|val/confusion)")
            time.sleep(4)
            board.shot()
            board.graphs(["features"], {"images", "logits", "classifier"})
            board.shot()
            board.tabs({"projector"})
            board.open("projector")
            time.sleep(15)  # it computes the components
            board.shot()
        for tab in ("custom_scalars", "images", "graphs", "projector"):
            shutil.copy(shots / f"{tab}.png", PICTURES / f"{tab}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sweep", type=Path)
    parser.add_argument("--run", type=Path)
    parser.add_argument("--height", type=int, default=1400, help="of the report that is shown")
    arguments = parser.parse_args()
    if arguments.sweep:
        report(arguments.sweep, arguments.height)
        hparams(arguments.sweep)
    if arguments.run:
        tabs(arguments.run)


if __name__ == "__main__":
    main()
