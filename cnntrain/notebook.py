"""What notebooks show: HTML of results, pictures in it, errors as one line.

IPython calls `_repr_html_`, `_repr_png_` and `_render_traceback_` where an object has them.
"""

import base64
import html
from collections.abc import Iterable, Sequence
from typing import Any


class OneLine:
    """An exception whose message is enough for the user: IPython shows it without a traceback."""

    def _render_traceback_(self) -> list[str]:
        return [f"{type(self).__name__}: {self}"]


def table_html(head: Sequence[Any], rows: Iterable[Sequence[Any]]) -> str:
    """A table; texts are escaped."""
    lines = [("th", head), *(("td", row) for row in rows)]
    cells = ("".join(f"<{tag}>{html.escape(str(c))}</{tag}>" for c in row) for tag, row in lines)
    return f"<table>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>"


def png_html(png: bytes) -> str:
    """A PNG file as an image within the page."""
    return f'<img src="data:image/png;base64,{base64.b64encode(png).decode()}"/>'
