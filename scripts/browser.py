"""Chromium driven by selenium: open a page, query it through shadow roots, take screenshots.

Needs Chromium and its driver (Debian: chromium, chromium-driver) and selenium.
"""

import io
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from typing_extensions import Self

CHROMEDRIVER = Path("/usr/bin/chromedriver")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--enable-unsafe-swiftshader",  # WebGL without a GPU, for the projector and Time Series
]

# Visible elements, through shadow roots and frames of the same origin. `place` is the bounding box
# of an element in the window.
WALK = """
function* walk(root) {
  if (root.shadowRoot) yield* walk(root.shadowRoot);
  for (const e of root.querySelectorAll('*')) {
    if (!e.checkVisibility()) continue;
    yield e;
    if (e.shadowRoot) yield* walk(e.shadowRoot);
    if (e.tagName === 'IFRAME' && e.contentDocument) yield* walk(e.contentDocument);
  }
}
function all(path, root = document) {  // 'a >>> b': every b within an a or its shadow root
  let found = [root];
  for (const selector of path.split('>>>').map(s => s.trim()))
    found = [...new Set(found.flatMap(r => [...walk(r)].filter(e => e.matches(selector))))];
  return found;
}
function drawn(path) { return (path.getAttribute('d') || '').split(/[ML]/).length - 1; }
function text(e) {  // of an element, without slots and shadow roots
  return e.textContent.replace(/\\s+/g, ' ').trim();
}
function place(e) {
  const r = e.getBoundingClientRect();
  let x = r.x, y = r.y;
  for (let w = e.ownerDocument.defaultView; w.frameElement; w = w.parent) {
    const f = w.frameElement.getBoundingClientRect();
    x += f.x; y += f.y;
  }
  return [x, y, r.width, r.height];
}
"""


def wait(look: Callable[[], Any], fault: str, seconds: float = 30) -> Any:
    """The first truthy result of `look`; AssertionError after this many seconds."""
    end = time.monotonic() + seconds
    while True:
        if found := look():
            return found
        if time.monotonic() > end:
            raise AssertionError(f"{fault}; found {found!r}")
        time.sleep(0.1)


class Browser:
    """Chromium with one page; `name` is used for its screenshots and errors."""

    def __init__(self, shots: Path | None = None, size: tuple[int, int] = (1400, 900)):
        self.shots, self.size, self.name = shots, size, "page"

    def __enter__(self) -> Self:
        self.profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        options = Options()
        for flag in [*FLAGS, f"--user-data-dir={self.profile.name}"]:
            options.add_argument(flag)
        self.chrome = webdriver.Chrome(options=options, service=Service(str(CHROMEDRIVER)))
        width, height = self.size  # of the page; --window-size includes the window's frame
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        return self

    def __exit__(self, *_: object) -> None:
        self.chrome.quit()
        self.profile.cleanup()

    def load(self, address: str) -> None:
        self.chrome.get("about:blank")  # a new fragment alone would load nothing
        self.chrome.get(address)

    def js(self, script: str, *arguments: Any) -> Any:
        return self.chrome.execute_script(WALK + script, *arguments)

    def texts(self, selector: str) -> list[str]:
        return self.js("return all(arguments[0]).map(text)", selector)

    def wait(self, script: str, *arguments: Any) -> Any:
        return wait(lambda: self.js(script, *arguments), f"{self.name}: {script} {arguments}")

    def wait_texts(self, selector: str, wanted: set[str]) -> None:
        """Wait until all of these texts are shown."""

        def missing() -> set[str]:
            return wanted - set(self.texts(selector))

        try:
            wait(lambda: not missing(), "")
        except AssertionError:
            raise AssertionError(
                f"{self.name}: no {sorted(missing())} among {self.texts(selector)}"
            ) from None

    def shot(self) -> np.ndarray:
        """A screenshot (height, width, 3), also written to `shots`."""
        png = self.chrome.get_screenshot_as_png()
        if self.shots:
            (self.shots / f"{self.name}.png").write_bytes(png)
        return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))

    def drawn(self, place: list[float]) -> tuple[int, int]:
        """In a box: the number of coloured pixels, and of those unlike the most common one."""
        x, y, width, height = map(round, place)
        part = self.shot()[max(y, 0) : y + height, max(x, 0) : x + width].reshape(-1, 3).astype(int)
        _, counts = np.unique(part, axis=0, return_counts=True)
        coloured = part.max(1) - part.min(1) > 25
        return int(coloured.sum()), len(part) - int(counts.max())

    def errors(self) -> list[str]:
        """Severe messages of the browser's log since the last call."""
        return [e["message"] for e in self.chrome.get_log("browser") if e["level"] == "SEVERE"]
