"""Prints the table, or puts it into a Markdown file."""

from __future__ import annotations

import sys
from pathlib import Path

from cnntrain.lab.capabilities import table

BEGIN, END = "<!-- capabilities -->\n", "<!-- /capabilities -->"

if len(sys.argv) > 1:
    file = Path(sys.argv[1])
    before, begin, rest = file.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        sys.exit(f"{file} has no lines {BEGIN.strip()} and {END.strip()}")
    file.write_text(before + begin + table() + end + after, encoding="utf-8")
else:
    print(table(), end="")
