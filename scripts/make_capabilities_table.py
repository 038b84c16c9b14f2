"""Capability table of the convolution backends in docs/convolutions.md.

    python scripts/make_capabilities_table.py                         # rewrites the table
    python scripts/make_capabilities_table.py --print mypkg.MyConv2d  # prints it, with this class

Each row is a use that `cnntrain verify` tries, with its numbers compared with those of
``nn.Conv2d``. A wrong number ends the script with an AssertionError.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

from hydra.utils import get_class

from cnntrain.conv import BACKENDS
from cnntrain.lab.verify import uses
from cnntrain.lab.verify.interface import Backend, Use

PAGE = Path(__file__).parents[1] / "docs/convolutions.md"
BEGIN, END = "<!-- capabilities -->\n", "<!-- /capabilities -->"


# Why the backends of cnntrain do not support a use, and what to do instead.
LIMITS: dict[Use, str] = {
    uses.batched_gradients: "passes by custom functions; use `torch.func.vjp` and `vmap`",
    uses.compile_transforms: "dynamo takes no custom function there; works uncompiled",
    uses.export_any_size: "a loop over output positions is part of the graph",
    uses.channels_last_output: "outputs are contiguous",
}


def table(backends: Mapping[str, Backend], tried: Mapping[str, Use] = uses.USES) -> str:
    """A Markdown table: a row for each use, a column for each backend.

    Raises:
        AssertionError: a number is wrong.
    """
    rows = [["", *(f"`{name}`" for name in backends), "why not"], ["---"] * (len(backends) + 2)]
    for name, use in tried.items():
        reasons = [use.attempt(backend) for backend in backends.values()]
        why = LIMITS.get(use, max(reasons)) if any(reasons) else ""
        rows.append([name, *("no" if reason else "yes" for reason in reasons), why])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def write(page: Path, content: str) -> None:
    """Replace what is between the markers of a Markdown file."""
    before, begin, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        sys.exit(f"{page} has no lines {BEGIN.strip()} and {END.strip()}")
    page.write_text(before + begin + content + end + after, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--print", nargs="*", metavar="CLASS", help="with columns for these classes"
    )
    classes = parser.parse_args().print
    if classes is None:
        write(PAGE, table(BACKENDS))
    else:
        print(table(BACKENDS | {name.rpartition(".")[2]: get_class(name) for name in classes}))


if __name__ == "__main__":
    main()
