"""What a folder of runs says, as files: a page with pictures, Markdown, CSV."""

import os
from pathlib import Path

from cnntrain.atomic import replacing
from cnntrain.sweeps.collect import Collection
from cnntrain.sweeps.ranking import rank
from cnntrain.sweeps.report.page import page
from cnntrain.sweeps.switches import switches_markdown
from cnntrain.sweeps.tables import group_csv, markdown


def write_report(collection: Collection, folder: str | os.PathLike[str]) -> list[Path]:
    """Write report.html, report.md and report.csv; returns their paths. Raises OSError."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    contents = {
        "report.html": page(collection, folder),
        "report.md": "\n".join(
            filter(None, [markdown(collection), switches_markdown(rank(collection))])
        ),
        "report.csv": group_csv(collection),
    }
    for name, content in contents.items():
        with replacing(folder / name) as file:
            file.write(content.encode())
    return [folder / name for name in contents]
