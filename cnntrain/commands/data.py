"""`cnntrain data inspect`: what a data set contains, before any training."""

import json
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from cnntrain import terminal
from cnntrain.commands.app import exit_with_os_error, printable, short, start
from cnntrain.commands.finished_run import report_errors
from cnntrain.config import ConfigError, as_config_error, build, folder_problem

if TYPE_CHECKING:
    from cnntrain.lab.inspection import Inspection, Pair

USAGE = """\
cnntrain data inspect [option=value ...]     (options: cnntrain data inspect --help)

  inspect   count, decode and compare the images of a data set, before any training
"""
MAX_ROWS = 100  # classes in the table
IMBALANCED = 3  # largest class / smallest


def main() -> None:
    name = (sys.argv[1:2] or [""])[0]
    if name in ("", "--help", "-h"):
        print(USAGE, end="")
        sys.exit(0 if name else 2)
    if name != "inspect":
        there_is = "there is: data inspect"
        print(f"cnntrain: no command 'data {printable(name)}'; {there_is}", file=sys.stderr)
        sys.exit(2)
    sys.argv[:2] = ["cnntrain data inspect"]
    start("inspect", _inspect, one="data set")


def _inspect(cfg: DictConfig) -> None:
    from cnntrain.lab.inspection import contact_sheet, inspect
    from cnntrain.pictures import png

    written = {"out": cfg.out, "json": cfg.json and str(Path(cfg.json).parent)}
    folders = [(option, folder) for option, folder in written.items() if folder is not None]
    if problems := [p for option, folder in folders if (p := folder_problem(folder, option))]:
        raise ConfigError(problems)
    logging.getLogger("cnntrain.data").setLevel(logging.WARNING)  # json=- is alone on stdout
    with as_config_error("data"):
        data = build(cfg.data)
    with report_errors():
        found, tiles = inspect(data)
    text = json.dumps(asdict(found), indent=2)
    if cfg.json == "-":
        print(text)
    else:
        _print(found)
    try:
        if cfg.json not in (None, "-"):
            Path(cfg.json).write_text(f"{text}\n", encoding="utf-8")
        if cfg.out is not None and tiles:
            picture, foreign = contact_sheet(found, tiles)
            file = Path(cfg.out) / "contact_sheet.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(png(picture))
            if cfg.json != "-":
                print(f"\n{short(file)}")
                if foreign:
                    terminal.paragraph(
                        f"shows classes by their number, as no font here has their characters: "
                        f"{_few(foreign)}; a font such as Noto Sans CJK shows them"
                    )
    except OSError as error:
        exit_with_os_error(error)
    if found.problems or (found.unreadable and cfg.data.get("on_error", "stop") == "stop"):
        sys.exit(1)


def _print(found: "Inspection") -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    def add(table: Table, cells: Sequence[str], dangerous: bool) -> None:
        texts = [Text(terminal.encodable(printable(cell))) for cell in cells]
        table.add_row(*texts, style="red" if dangerous else "")

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for title in ("class", "train", "val", "test", "all"):
        table.add_column(title, justify="left" if title == "class" else "right")
    counts = {name: [*own.values(), sum(own.values())] for name, own in found.classes.items()}
    shown = counts
    if len(counts) > MAX_ROWS:
        print(f"the {MAX_ROWS} smallest of {len(counts):,} classes (json=<file> has all):")
        shown = dict(sorted(counts.items(), key=lambda item: item[1][-1])[:MAX_ROWS])
    total = [sum(column) for column in zip(*counts.values(), strict=True)]
    for name, numbers in (shown | {"all classes": total}).items() if counts else ():
        add(table, [name, *(f"{number:,}" for number in numbers)], 0 in numbers)
    lines = Table(box=None, show_header=False, pad_edge=False)
    for _ in range(2):
        lines.add_column()
    for subject, text, dangerous in _lines(found, counts):
        add(lines, [subject, text], dangerous)
    if counts:
        terminal.print_table(table, ())
        print()
    terminal.print_table(lines, ())


def _lines(found: "Inspection", counts: dict[str, list[int]]) -> Iterator[tuple[str, str, bool]]:
    """Subject, finding, and whether it is dangerous and shown in red."""
    for problem in found.problems:
        yield "problem", problem, True
    if found.sizes and found.shape:
        text = "smallest {}x{}, median {}x{}, largest {}x{} (height x width)"
        yield "image sizes", text.format(*(side for size in found.sizes for side in size)), False
        channels, height, width = found.shape
        color = "rgb" if channels == 3 else "grey"
        yield "training takes", f"{height}x{width}, {color}; see data.size and data.color", False
        kinds = [f"{name} {count:,}" for name, count in found.formats.items()]
        yield "formats", ", ".join(kinds), False
    if bad := [f"{name}: {reason}" for name, reason in found.unreadable.items()]:
        yield "unreadable", f"{len(bad):,}: {_few(bad)}; data.on_error=skip leaves them out", True
    if ignored := [f"{len(f):,} {end} ({f[0]})" for end, f in found.ignored.items()]:
        yield "ignored files", ", ".join(ignored), False
    lacking = {"empty classes": found.empty_classes}
    lacking["only one image"] = [name for name, own in counts.items() if own[3] == 1]
    for k, part in enumerate(("training", "validation", "test")):
        lacking[f"no {part} images"] = [name for name, own in counts.items() if not own[k]]
    for subject, names in lacking.items():
        if names:
            yield subject, _few(names), True
    training = [own[0] for own in counts.values() if own[0]]
    if training and (ratio := max(training) / min(training)) >= IMBALANCED:
        text = f"largest class / smallest: {ratio:.3g} in training; see loss.class_weights=balanced"
        yield "imbalance", f"{text} and data.sampler=balanced", False
    inside = [pair for pair in found.duplicates if pair.parts[0] == pair.parts[1]]
    for subject, exact in (("duplicates", True), ("near duplicates", False)):
        if pairs := [pair for pair in inside if pair.exact == exact]:
            yield subject, f"{len(pairs):,} pairs within a part: {_pairs(pairs)}", False
    for part in ("val", "test"):
        pairs = [pair for pair in found.duplicates if {*pair.parts} == {"train", part}]
        pairs.sort(key=lambda pair: pair.exact)  # the last pair of an image is shown
        if images := {pair.names[pair.parts.index(part)]: pair for pair in pairs}:
            same = sum(pair.exact for pair in images.values())
            text = f"{len(images):,} {part} images have a duplicate in the training set"
            text += f" ({same:,} of them with the same pixels): {_pairs([*images.values()])}"
            yield "leakage", text, True
    if pairs := [pair for pair in found.duplicates if pair.labels[0] != pair.labels[1]]:
        yield "other labels", f"{len(pairs):,} pairs with different labels: {_pairs(pairs)}", True
    if found.duplicates:
        yield "", "=: the same pixels at the network's size; ~: alike, look at them", False
    if not found.near:
        yield "near duplicates", "need imagehash; pip install imagehash", False


def _few(texts: Sequence[str]) -> str:
    from cnntrain.data.entries import few

    return few(texts)


def _pairs(pairs: "Sequence[Pair]") -> str:
    ordered = sorted(pairs, key=lambda pair: not pair.exact)
    return _few([f"{' = ' if pair.exact else ' ~ '}".join(pair.names) for pair in ordered])
