"""Output: standard streams that never raise, tables that fit the terminal, HTML for notebooks."""

from __future__ import annotations

import base64
import codecs
import contextlib
import errno
import html
import io
import logging
import os
import shutil
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

UNLIMITED = 10_000  # characters, for a line in a file or a pipe
PARAGRAPH = 110  # characters, for a line of prose
ASCII = dict(zip("−–≈×·─", "--~x.-", strict=True)) | {"±": "+-", "≥": ">="}
TABLE_OPTIONS = ("box", "show_header", "show_edge", "show_footer", "pad_edge", "collapse_padding")
COLUMN_OPTIONS = ("header", "footer", "justify", "max_width")
ERRORS = "cnntrain.ascii"  # the name of the error handler


def _to_ascii(error: UnicodeError) -> tuple[str, int]:
    """Error handler for `str.encode`: the nearest ASCII text, else a backslash escape."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return "".join(ASCII.get(c) or ascii(c)[1:-1] for c in text), error.end


codecs.register_error(ERRORS, _to_ascii)


class _Output(io.FileIO):
    """File descriptor of a standard stream; what cannot be written is dropped.

    A closed pipe is no error; any other, such as a full disk, is reported and kept in `failed`.
    """

    failed: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno != errno.EPIPE and self.failed is None:
                self.failed = error
                if self.fileno() == 1:
                    write_stderr(f"cnntrain: standard output: {error.strerror}")
            return len(data)


def output(descriptor: int, encoding: str, *, line_buffering: bool = True) -> io.TextIOWrapper:
    """A text stream that raises neither for characters nor for bytes that cannot be written."""
    raw = _Output(descriptor, "w", closefd=False)
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding, ERRORS, line_buffering=line_buffering)


def write_stderr(line: str) -> None:
    """Write a line to the file descriptor, past the buffer of the stream."""
    with contextlib.suppress(OSError):
        os.write(2, f"{line}\n".encode(getattr(sys.stderr, "encoding", None) or "ascii", ERRORS))


@contextlib.contextmanager
def safe_streams() -> Iterator[None]:
    """Standard streams of a command that never raise, whatever they are connected to.

    A closed stream becomes the null device. If standard output could not be written, but for a
    closed pipe, exit code 0 becomes 1.
    """
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        stream = getattr(sys, name)
        if stream is None:
            # The lowest free descriptor is this one: no file opened later may get it.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
            stream = open(os.devnull, "w" if descriptor else "r", encoding="utf-8")  # noqa: SIM115
            setattr(sys, name, stream)
        elif descriptor and stream is getattr(sys, f"__{name}__"):
            stream.flush()
            buffered = stream.line_buffering or stream.write_through
            setattr(sys, name, output(descriptor, stream.encoding, line_buffering=buffered))
    try:
        yield
    except SystemExit as ended:
        if ended.code:
            raise
    sys.stdout.flush()
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    if isinstance(raw, _Output) and raw.failed:
        sys.exit(1)


def width() -> int:
    """Characters in a line: the terminal's, else COLUMNS, else UNLIMITED."""
    if sys.stdout is not None and sys.stdout.isatty():
        return shutil.get_terminal_size().columns
    columns = os.environ.get("COLUMNS", "")
    return int(columns) if columns.isdecimal() and int(columns) else UNLIMITED


def encodable(text: str) -> str:
    """A text as standard output shows it, so that columns stay aligned in any encoding."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, ERRORS).decode(encoding)


def printable(text: str) -> str:
    """A text in one line, with control and invalid characters escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def print_table(table: Table, optional: Sequence[str], where: str = "") -> None:
    """Print a table, in color on a terminal; see `table_text`."""
    print(table_text(table, optional, width(), where, styled=sys.stdout.isatty()))


def table_text(
    table: Table, optional: Sequence[str], columns: int, where: str = "", *, styled: bool = False
) -> str:
    """A table without the columns of `optional`, in this order, for which there is no room.

    A column's name is the first line of its header. A line names the columns that are left out, and
    `where` they can be found. Cells of a table that is still wider than `columns` are folded.
    """
    left_out: list[str] = []
    needed = UNLIMITED
    for names in ([], *([name] for name in optional)):
        if needed > columns:
            text = _render(table, [*left_out, *names])
            narrower = max(map(len, text.splitlines()))
            if narrower < needed:  # else there is no such column
                needed = narrower
                left_out += names
    lines = [_render(table, left_out, columns, styled)]
    if left_out:
        text = f"No room for {', '.join(left_out)}: a wider terminal{where} shows them."
        lines += _wrapped(text, columns)
    return "\n".join(lines)


def _render(
    table: Table, left_out: Sequence[str], columns: int = UNLIMITED, styled: bool = False
) -> str:
    from rich.console import Console

    kept = [c for c in table.columns if str(c.header).strip().split("\n")[0] not in left_out]
    new = type(table)(**{name: getattr(table, name) for name in TABLE_OPTIONS})
    for c in kept:
        new.add_column(**{name: getattr(c, name) for name in COLUMN_OPTIONS}, overflow="fold")
    for row, *cells in zip(table.rows, *(c.cells for c in kept), strict=True):
        new.add_row(*cells, style=row.style)
    file = io.StringIO()
    console = Console(file=file, width=columns, force_terminal=styled, force_jupyter=False)
    console.print(new, crop=False)
    return file.getvalue().rstrip("\n")


def paragraph(text: str) -> None:
    """Print prose in lines that fit, and flush."""
    print("\n".join(_wrapped(text, width())), flush=True)


def _wrapped(text: str, columns: int) -> list[str]:
    options: Any = {"break_long_words": False, "break_on_hyphens": False}  # for file paths
    columns = columns if columns == UNLIMITED else min(columns, PARAGRAPH)
    wrapped = [textwrap.wrap(line, columns, **options) for line in encodable(text).splitlines()]
    return [part for parts in wrapped for part in parts or [""]]


class TerminalHandler(logging.StreamHandler):
    """Log handler that prints the attribute `terminal` of a record, a short line, if it has one."""

    def format(self, record: logging.LogRecord) -> str:
        return encodable(getattr(record, "terminal", None) or super().format(record))


class NoTraceback:
    """Mixin for exceptions that IPython shows as their message, without a traceback."""

    def _render_traceback_(self) -> list[str]:
        return [f"{type(self).__name__}: {self}"]


def table_html(head: Sequence[Any], rows: Iterable[Sequence[Any]]) -> str:
    """An HTML table; texts are escaped."""
    lines = [("th", head), *(("td", row) for row in rows)]
    cells = ("".join(f"<{tag}>{html.escape(str(c))}</{tag}>" for c in row) for tag, row in lines)
    return f"<table>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>"


def png_html(png: bytes) -> str:
    """A PNG file as an HTML image with its data."""
    return f'<img src="data:image/png;base64,{base64.b64encode(png).decode()}"/>'
