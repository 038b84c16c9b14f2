"""Terminal output: standard streams that never raise, and text that fits the terminal's width.

Nothing here imports rich before it is needed: signals are handled from this module's use on.
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import io
import logging
import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

UNLIMITED = 10_000  # characters, of a line in a file or a pipe
PARAGRAPH = 110  # characters, of a line of prose
ASCII = dict(zip("−–≈×·─", "--~x.-", strict=True)) | {"±": "+-", "≥": ">="}
ERRORS = "cnntrain.ascii"
LOOK = ("box", "show_edge", "show_footer", "pad_edge", "collapse_padding")  # of a table

Shown = TypeVar("Shown", str, "Table")


def _replaced(error: UnicodeError) -> tuple[str, int]:
    """An error handler for `str.encode`: the nearest ASCII text, else a backslash escape."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return "".join(ASCII.get(c) or ascii(c)[1:-1] for c in text), error.end


codecs.register_error(ERRORS, _replaced)


class _Output(io.FileIO):
    """A standard stream's file descriptor; what cannot be written is dropped.

    The reader of a pipe may have gone, which is no error, or the disk may be full.
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
    """A text stream that never raises: of characters and bytes that cannot be written."""
    raw = _Output(descriptor, "w", closefd=False)
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding, ERRORS, line_buffering=line_buffering)


def write_stderr(line: str) -> None:
    """Write a line to the descriptor itself, where a stream may be in the middle of another."""
    with contextlib.suppress(OSError):
        os.write(2, f"{line}\n".encode(getattr(sys.stderr, "encoding", None) or "ascii", ERRORS))


@contextlib.contextmanager
def safe_streams() -> Iterator[None]:
    """Standard streams of a command that never raise, whatever they are connected to.

    A closed stream is the null device. A closed pipe changes nothing, the exit code included; where
    standard output could not be written for another reason, exit code 0 becomes 1.
    """
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        stream = getattr(sys, name)
        if stream is None:
            # The lowest free descriptor is this one: no file that is opened later may get it.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
            stream = open(os.devnull, "w" if descriptor else "r", encoding="utf-8")  # noqa: SIM115
            setattr(sys, name, stream)
        elif descriptor and stream is getattr(sys, f"__{name}__"):
            if os.name == "nt" and stream.isatty():  # written by another way than FileIO
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
    """Characters in a line: COLUMNS, or the terminal's; UNLIMITED where output is no terminal."""
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
    """What `build` makes without the names in the list that it is given, and that list: as many of
    `optional`, from the first on, as have to be left out so that it has at most `columns`."""
    left_out: list[str] = []
    shown = build(left_out)
    for name in optional:
        if measure(shown) <= columns:
            break
        narrower = build([*left_out, name])
        if measure(narrower) < measure(shown):  # else there is nothing of this name
            shown = narrower
            left_out.append(name)
    return shown, left_out


def fit_lines(
    build: Callable[[Sequence[str]], str], optional: Sequence[str], columns: int | None = None
) -> tuple[str, list[str]]:
    """`fit` for lines of text."""
    return fit(build, optional, columns or width(), lambda s: max(map(len, s.splitlines())))


def print_table(table: Table, optional: Sequence[str], where: str = "") -> None:
    """Print a table, as `write_table`, on standard output."""
    from rich.console import Console

    write_table(table, optional, Console(width=width()), where)


def table_text(table: Table, optional: Sequence[str], columns: int) -> str:
    """A table as `write_table` has it, so many characters wide."""
    from rich.console import Console

    text = io.StringIO()  # a notebook would else show the table itself
    console = Console(file=text, width=columns, force_jupyter=False, color_system=None)
    write_table(table, optional, console)
    return text.getvalue().rstrip("\n")


def write_table(table: Table, optional: Sequence[str], console: Console, where: str = "") -> None:
    """Write a table without the columns of `optional` for which there is no room, and which they
    are. A column's name is the first line of its header. Cells of what is still too wide are
    folded."""
    from rich.console import Console
    from rich.table import Table

    def build(left_out: Sequence[str]) -> Table:
        kept = [c for c in table.columns if str(c.header).strip().split("\n")[0] not in left_out]
        new = Table(**{name: getattr(table, name) for name in LOOK})
        for c in kept:
            new.add_column(
                c.header, c.footer, justify=c.justify, max_width=c.max_width, overflow="fold"
            )
        for row, *cells in zip(table.rows, *(c.cells for c in kept), strict=True):
            new.add_row(*cells, style=row.style)
        return new

    unlimited = Console(width=UNLIMITED)
    fitted, left_out = fit(
        build, optional, console.width, lambda shown: unlimited.measure(shown).maximum
    )
    console.print(fitted, crop=False)
    for line in left_out_lines(left_out, where, console.width):
        print(line, file=console.file)


def left_out_lines(
    left_out: Sequence[str], where: str = "", columns: int | None = None
) -> list[str]:
    """Which columns a narrow terminal does not show, in lines that fit; none if it shows all."""
    said = f"No room for {', '.join(left_out)}: a wider terminal{where} shows them."
    return _wrapped(said, columns or width()) if left_out else []


def paragraph(text: str) -> None:
    """Print prose in lines that fit, at once."""
    print("\n".join(_wrapped(text, width())), flush=True)


def _wrapped(text: str, columns: int) -> list[str]:
    options: Any = {"break_long_words": False, "break_on_hyphens": False}  # paths stay whole
    lines = encodable(text).splitlines()
    columns = columns if columns == UNLIMITED else min(columns, PARAGRAPH)
    wrapped = [textwrap.wrap(line, columns, **options) for line in lines]
    return [part for parts in wrapped for part in parts or [""]]


class TerminalHandler(logging.StreamHandler):
    """Logs to a terminal: the attribute `terminal` of a record in place of its message, if given.

    So train.log has whole lines where the terminal has room for a part of them.
    """

    def format(self, record: logging.LogRecord) -> str:
        return encodable(getattr(record, "terminal", None) or super().format(record))
