"""Screenshots of the report and of TensorBoard for the docs.

    python scripts/make_pictures.py --sweep outputs/sweeps/compare --run outputs/mine

Of a sweep the report and the HParams tab, of a run the other tabs of TensorBoard. Needs Chromium
and its driver (Debian: chromium, chromium-driver) and selenium.
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
    """The top of the page that `cnntrain report` has written."""
    page = (sweep / "report/report.html").absolute().as_uri()
    with Browser(PICTURES, (1200, height)) as browser:
        browser.name = "report"
        browser.load(page)
        browser.shot()


def hparams(sweep: Path) -> None:
    """TensorBoard's HParams tab of a sweep."""
    with Server(sweep) as address, Board(address, shots=PICTURES, size=(1400, 700)) as board:
        board.open("hparams")
        time.sleep(15)  # for reading the event files
        board.open("hparams")
        time.sleep(5)
        board.shot()


def tabs(run: Path) -> None:
    """TensorBoard's other tabs of a run."""
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
            time.sleep(15)  # for computing the components
            board.shot()
        for tab in ("custom_scalars", "images", "graphs", "projector"):
            shutil.copy(shots / f"{tab}.png", PICTURES / f"{tab}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sweep", type=Path)
    parser.add_argument("--run", type=Path)
    parser.add_argument("--height", type=int, default=1400, help="of the screenshot of the report")
    arguments = parser.parse_args()
    if arguments.sweep:
        report(arguments.sweep, arguments.height)
        hparams(arguments.sweep)
    if arguments.run:
        tabs(arguments.run)


if __name__ == "__main__":
    main()
