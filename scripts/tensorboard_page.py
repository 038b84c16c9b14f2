"""TensorBoard in a browser: its server, and checks of what each tab shows."""

import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote

from browser import Browser, wait


class Server:
    """A TensorBoard server on a free port."""

    def __init__(self, logdir: Path, *options: str):
        self.logdir, self.options = logdir, options

    def __enter__(self) -> str:
        script = "from tensorboard.main import run_main; run_main()"
        where = ["--logdir", str(self.logdir), "--host", "127.0.0.1", "--port", "0"]
        # A file, because a pipe that is not read would fill up.
        self.log = tempfile.TemporaryFile("w+", encoding="utf-8")
        self.process = subprocess.Popen(
            [sys.executable, "-c", script, *where, *self.options], stderr=self.log
        )
        try:
            return wait(self.address, "TensorBoard has no address")
        except BaseException:
            self.__exit__()
            raise

    def address(self) -> str | None:
        self.log.seek(0)
        said = self.log.read()
        if self.process.poll() is not None:
            raise RuntimeError(said)
        found = re.search(r"at (http://127\.0\.0\.1:\d+/)", said)
        return found.group(1) if found else None

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(10)
        self.log.close()


def either(tags: set[str]) -> str:
    """A regular expression, in JavaScript's syntax, for these tags."""
    return "|".join(f"^{re.escape(tag)}$" for tag in sorted(tags))


class Board(Browser):
    """TensorBoard's page at an address."""

    def __init__(self, address: str, **options: Any):
        super().__init__(**options)
        self.address = address

    def open(self, tab: str, tags: str = "", query: str = "") -> None:
        """Open a tab, filtered by a regular expression for tags.

        The filter also expands the section; without it only the first three are expanded.
        """
        self.name = tab
        angular = tab == "timeseries"
        if tags:
            tags = f"tagFilter={quote(tags, safe='')}"
        query = "&".join(filter(None, [query, tags if angular else ""]))
        fragment = "&".join(filter(None, [tab, tags if not angular else ""]))
        self.load(f"{self.address}{'?' + query if query else ''}#{fragment}")

    def wait_cards(self, kind: str, measure: str, wanted: dict[str, Any]) -> None:
        """Wait until each of these tags has a card whose `measure` is as wanted.

        A card may appear twice: once in the section of filtered tags.
        """
        script = f"""return all('{kind}').map(card => [
            all('.heading-label.name', card).map(text)[0], {measure}])"""

        def seen() -> dict[str, Any]:
            return dict(self.js(script)[::-1])

        try:
            wait(lambda: {k: v for k, v in seen().items() if k in wanted} == wanted, "")
        except AssertionError:
            raise AssertionError(f"{self.name}: {seen()}, not {wanted}") from None

    # One method a tab: waits until the tab shows what is asked for, else AssertionError.

    def tabs(self, wanted: set[str]) -> None:
        """Wait until these tabs are active; the projector is some seconds late."""

        def active() -> set[str]:
            return set(
                self.js(
                    "return fetch('data/plugins_listing').then(r => r.json()).then("
                    "  p => Object.keys(p).filter(k => p[k].enabled))"
                )
            )

        self.name = "tabs"
        self.load(self.address)
        wait(lambda: wanted <= active(), f"not all of {sorted(wanted)}")

    def scalars(self, tags: set[str], points: int) -> None:
        """A line for each tag, with this many points."""
        self.open("scalars", either(tags))
        self.wait_cards(
            "tf-scalar-card",
            "all('.line-plot:not(.ghost) >>> path.line', card).map(drawn).filter(n => n)",
            {tag: [points] for tag in tags},
        )

    def timeseries(self, tag: str) -> None:
        self.open("timeseries", either({tag}))
        self.wait_texts("scalar-card tb-truncated-path", {tag})
        where = self.wait("return all('scalar-card .series-view canvas').map(place)[0]")
        # A worker draws the canvas through WebGL, so its pixels are checked. The rest is grey.
        wait(lambda: self.drawn(where)[0] > 100, "timeseries: no line has been drawn")

    def custom_scalars(self, charts: dict[str, int]) -> None:
        """Charts by title, with the number of their lines."""
        self.open("custom_scalars")
        self.wait_cards(
            "tf-custom-scalar-multi-line-chart-card",
            "all('.line-plot:not(.ghost) >>> path.line', card).filter(p => drawn(p) > 1).length",
            charts,
        )

    def images(self, sizes: dict[str, tuple[int, int]]) -> None:
        """Images by tag, loaded, with their sizes."""
        self.open("images", either(set(sizes)))
        self.wait_cards(
            "tf-image-loader",
            """all('img', card).filter(i => i.complete && i.naturalWidth)
                 .flatMap(i => [i.naturalWidth, i.naturalHeight])""",
            {tag: list(size) for tag, size in sizes.items()},
        )

    def histograms(self, tags: set[str], steps: int) -> None:
        self.open("histograms", either(tags))
        self.wait_cards(
            "tf-histogram-loader",
            "all('g.histogram path.outline', card).filter(p => drawn(p) > 2).length",
            dict.fromkeys(tags, steps),
        )

    def distributions(self, tags: set[str]) -> None:
        self.open("distributions", either(tags))
        self.wait_cards(  # eight areas between nine quantiles
            "tf-distribution-loader",
            "all('path.area', card).filter(p => drawn(p) > 2).length",
            dict.fromkeys(tags, 8),
        )

    def graphs(self, names: list[str], wanted: set[str]) -> None:
        """Expand nodes by their full names, in turn; then the nodes `wanted` must be shown."""
        self.open("graphs")
        for name in names:
            self.wait(
                """const name = n => n.__data__?.node.name, called = arguments[0];
                   const find = () => all('g.nodes > g.node').find(n => name(n) === called);
                   const node = find(), open = () => find().classList.contains('expanded');
                   if (node && !open())  // the shape has the listener, maybe later
                     node.querySelector('.nodecolortarget').dispatchEvent(
                       new MouseEvent('dblclick', {bubbles: true, view: window}));
                   return node && open()""",
                name,
            )

        def seen() -> set[str]:
            return set(self.js("return all('g.nodes > g.node').map(n => n.__data__?.node.name)"))

        try:
            wait(lambda: wanted <= seen(), "")
        except AssertionError:
            raise AssertionError(f"graphs: {sorted(wanted)} not all in {sorted(seen())}") from None
        time.sleep(1)  # for the animation; only for screenshots

    def text(self, tag: str, cells: set[str]) -> None:
        """Cells of a Markdown table, which TensorBoard nests in a table of its own."""
        self.open("text", either({tag}))
        self.wait_texts("tf-text-loader >>> .heading-label.name", {tag})
        self.wait_texts("tf-text-loader >>> table table th, table table td", cells)

    def pr_curves(self, tag: str) -> None:
        self.open("pr_curves", either({tag}))
        self.wait_texts("tf-pr-curve-card >>> .heading-label.name", {tag})
        self.wait(
            """return all('tf-pr-curve-card >>> .line-plot:not(.ghost) >>> path.line')
                 .some(p => drawn(p) > 20)"""
        )

    def projector(self, points: int, dimensions: int, columns: set[str]) -> None:
        self.tabs({"projector"})  # a page shows the tabs that are active when it is loaded
        self.open("projector")
        self.wait_texts(".numDataPoints", {str(points)})
        self.wait_texts(".dim", {str(dimensions)})
        # The sprite is a texture, not an <img>.
        sprite = self.wait(
            """const p = all('vz-projector')[0], s = p?.dataSet?.spriteAndMetadataInfo;
               const i = s?.spriteImage;
               return i?.complete && i.naturalWidth && {
                 size: [i.naturalWidth, i.naturalHeight], one: s.spriteMetadata.singleImageDim,
                 columns: Object.keys(p.dataSet.points[0].metadata)}"""
        )
        rows, across = (
            whole // one for whole, one in zip(sprite["size"], sprite["one"], strict=True)
        )
        assert rows * across >= points, sprite
        assert columns <= set(sprite["columns"]), sprite
        # A dialogue is shown while the components are computed.
        self.wait(
            """return all('#total-variance').some(e => /\\d%/.test(text(e)))
                 && !all('iron-overlay-backdrop, .notify-msg').length"""
        )
        where = self.js("return all('#scatter').map(place)[0]")
        enough = 0.02 * where[2] * where[3]  # more than axes and icons
        wait(lambda: self.drawn(where)[1] > enough, "projector: nothing has been drawn")

    def hparams(self, rows: list[dict[str, str]]) -> None:
        """Rows of the table view, compared in the given columns."""
        self.open("hparams")

        def table() -> list[dict[str, str]]:
            names = self.texts("#sessionGroupsTable .table-header")
            cells = self.texts("#sessionGroupsTable > vaadin-grid-cell-content")
            cells = cells[cells.index("Trial ID") + len(names) :] if names else []
            step = len(names) or 1
            return [
                dict(zip(names, cells[i : i + step], strict=False))
                for i in range(0, len(cells), step)
            ]

        def fits() -> bool:
            found = table()
            return len(found) == len(rows) and all(
                any(row.items() <= other.items() for other in found) for row in rows
            )

        try:
            wait(fits, "")
        except AssertionError:
            raise AssertionError(f"hparams: {table()}, not {rows}") from None
