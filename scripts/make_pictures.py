"""The README's pictures of a sweep, taken in a real browser: its report and its HParams tab.

    python scripts/make_pictures.py outputs/sweeps/compare

Needs Chromium and its driver (Debian: chromium, chromium-driver) and selenium.
"""

import argparse
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service

PICTURES = Path(__file__).parent / "pictures"
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
]


def browser(profile: str, width: int, height: int) -> webdriver.Chrome:
    options = Options()
    for flag in [*FLAGS, f"--user-data-dir={profile}", f"--window-size={width},{height}"]:
        options.add_argument(flag)
    return webdriver.Chrome(options=options, service=Service("/usr/bin/chromedriver"))


def report(sweep: Path, height: int) -> None:
    """The upper part of the page that `cnntrain report` has written."""
    page = (sweep / "report/report.html").absolute().as_uri()
    with tempfile.TemporaryDirectory() as profile:
        chrome = browser(profile, 1200, height)
        chrome.get(page)
        chrome.save_screenshot(str(PICTURES / "report.png"))
        chrome.quit()


def hparams(sweep: Path) -> None:
    """TensorBoard's HParams tab over the sweep's folder."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    script = "from tensorboard.main import run_main; run_main()"
    where = ["--logdir", str(sweep), "--port", str(port), "--host", "127.0.0.1"]
    server = subprocess.Popen([sys.executable, "-c", script, *where], stderr=subprocess.DEVNULL)
    try:
        with tempfile.TemporaryDirectory() as profile:
            time.sleep(15)  # it reads the event files
            chrome = browser(profile, 1400, 700)
            chrome.get(f"http://127.0.0.1:{port}/#hparams")
            time.sleep(10)
            chrome.save_screenshot(str(PICTURES / "hparams.png"))
            chrome.quit()
    finally:
        server.terminate()
        server.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("sweep", type=Path)
    parser.add_argument("--height", type=int, default=1400, help="of the report that is shown")
    arguments = parser.parse_args()
    report(arguments.sweep, arguments.height)
    hparams(arguments.sweep)


if __name__ == "__main__":
    main()
