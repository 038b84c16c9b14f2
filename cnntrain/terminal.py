"""Output: standard streams that never raise, tables that fit the terminal, HTML for notebooks.

rich is imported only where a table is printed, because commands handle signals from this module on.
"""

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
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

UNLIMITED = 10_000  # characters, for a line in a file or a pipe
PARAGRAPH = 110  # characters, for a line of prose
ASCII = dict(zip("−–≈×·─", "--~x.-", strict=True)) | {"±": "+-", "≥": ">="}
ERRORS = "cnntrain.ascii"  # the name of the error handler
TABLE_OPTIONS = ("box", "show_edge", "show_footer", "pad_edge", "collapse_padding")

Shown = TypeVar("Shown", str, "Table")


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
            # Windows reports a closed pipe as EINVAL.
            if error.errno not in (errno.EPIPE, errno.EINVAL) and self.failed is None:
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

    A closed stream becomes the null device, and a closed pipe is ignored. If standard output could
    not be written for another reason, exit code 0 becomes 1.
    """
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        stream = getattr(sys, name)
        if stream is None:
            # The lowest free descriptor is this one: no file opened later may get it.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
            stream = open(os.devnull, "w" if descriptor else "r", encoding="utf-8")  # noqa: SIM115
            setattr(sys, name, stream)
        elif descriptor and stream is getattr(sys, f"__{name}__"):
            if os.name == "nt" and stream.isatty():  # a console is not written by FileIO
                stream.reconfigure(errors=ERRORS)
                continue
            stream.flush()
            buffered = stream.line_buffering or stream.write_through
            setattr(sys, name, output(descriptor, stream.encoding, line_buffering=buffered))
    code = None
    try:
        yield
    except SystemExit as ended:
        code = ended
    sys.stdout.flush()
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    if isinstance(raw, _Output) and raw.failed and not (code and code.code):
        sys.exit(1)
    if code:
        raise code


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


def fit(
    build: Callable[[Sequence[str]], Shown],
    optional: Sequence[str],
    columns: int,
    measure: Callable[[Shown], int],
) -> tuple[Shown, list[str]]:
    """Leave out optional parts, in this order, until a text or table is narrow enough.

    Args:
        build: makes the text or table without the parts of these names.
        optional: names of the parts that may be left out.
        columns: the width that it may have at most.
        measure: the width that it has.

    Returns:
        The text or table, and the names that were left out.
    """
    left_out: list[str] = []
    shown = build(left_out)
    for name in optional:
        if measure(shown) <= columns:
            break
        narrower = build([*left_out, name])
        if measure(narrower) < measure(shown):  # else there is no such part
            shown = narrower
            left_out.append(name)
    return shown, left_out


def fit_lines(
    build: Callable[[Sequence[str]], str], optional: Sequence[str], columns: int | None = None
) -> tuple[str, list[str]]:
    """`fit` for lines of text; by default to the width of the terminal."""
    return fit(build, optional, columns or width(), lambda s: max(map(len, s.splitlines())))


def print_table(table: Table, optional: Sequence[str], where: str = "") -> None:
    """Print a table without the columns of `optional` for which the terminal has no room.

    A column's name is the first line of its header. Cells of a table that is still too wide are
    folded. A line names the columns that are left out, and `where` they can be found.
    """
    from rich.console import Console

    _write_table(table, optional, Console(width=width()), where)


def table_text(table: Table, optional: Sequence[str], columns: int) -> str:
    """A table as `print_table` prints it, of at most this many columns of characters."""
    from rich.console import Console

    text = io.StringIO()
    console = Console(file=text, width=columns, force_jupyter=False, color_system=None)
    _write_table(table, optional, console)
    return text.getvalue().rstrip("\n")


def _write_table(table: Table, optional: Sequence[str], console: Console, where: str = "") -> None:
    from rich.console import Console
    from rich.table import Table

    def build(left_out: Sequence[str]) -> Table:
        kept = [c for c in table.columns if str(c.header).strip().split("\n")[0] not in left_out]
        new = Table(**{name: getattr(table, name) for name in TABLE_OPTIONS})
        for c in kept:
            new.add_column(c.header, c.footer, justify=c.justify, max_width=c.max_width,
                           overflow="fold")  # fmt: skip
        for row, *cells in zip(table.rows, *(c.cells for c in kept), strict=True):
            new.add_row(*cells, style=row.style)
        return new

    unlimited = Console(width=UNLIMITED)
    fitted, left_out = fit(build, optional, console.width, lambda t: unlimited.measure(t).maximum)
    console.print(fitted, crop=False)
    for line in left_out_lines(left_out, where, console.width):
        print(line, file=console.file)


def left_out_lines(
    left_out: Sequence[str], where: str = "", columns: int | None = None
) -> list[str]:
    """Lines that name the columns a narrow terminal does not show, if any."""
    text = f"No room for {', '.join(left_out)}: a wider terminal{where} shows them."
    return _wrapped(text, columns or width()) if left_out else []


def paragraph(text: str) -> None:
    """Print prose in lines that fit, and flush."""
    print("\n".join(_wrapped(text, width())), flush=True)


def _wrapped(text: str, columns: int) -> list[str]:
    options: Any = {"break_long_words": False, "break_on_hyphens": False}  # for file paths
    columns = columns if columns == UNLIMITED else min(columns, PARAGRAPH)
    wrapped = [textwrap.wrap(line, columns, **options) for line in encodable(text).splitlines()]
    return [part for parts in wrapped for part in parts or [""]]


class TerminalHandler(logging.StreamHandler):
    """Log handler that prints a record's attribute `terminal`, if any, instead of its message.

    train.log then has whole lines where the terminal shows shortened ones.
    """

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
