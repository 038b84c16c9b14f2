"""The report's page: one HTML file that needs no other, in light and dark, on paper and phones."""

import os
import re
import shlex
from collections.abc import Iterable, Sequence
from datetime import datetime
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import quote

import cnntrain
from cnntrain.sweeps.collect import Collection
from cnntrain.sweeps.ranking import DIFFERS, Ranking, rank, text
from cnntrain.sweeps.record import METRICS, Member
from cnntrain.sweeps.report.coordinates import parallel_coordinates
from cnntrain.sweeps.report.cost import cost
from cnntrain.sweeps.report.curves import learning_curves, search_history
from cnntrain.sweeps.report.drawing import THEME, Picture, is_number, look
from cnntrain.sweeps.report.effects import MOST_PANELS, effects
from cnntrain.sweeps.switches import COLUMNS, of_pairs, switches
from cnntrain.sweeps.tables import columns, difference, duration, note, number, rows, unit, value

MOST_PAIRS = 16  # groups in the table of pairs


def page(collection: Collection, folder: Path) -> str:
    """The whole of report.html; `folder` is where it will lie, for links to the runs."""
    ranking = rank(collection)
    command = shlex.join(["cnntrain", "report", str(collection.folder.absolute())])
    asset = files(__package__).joinpath
    parts = [
        _head(collection),
        _answer(ranking),
        _section("Ranking", _ranking(ranking)),
        _section("Learning curves", _figures(learning_curves(ranking), "pair")),
        _section("Progress of the search", _figures([search_history(ranking)], "aside")),
        _section("What each option does", _effects(ranking)),
        _section("All options together", _figures([parallel_coordinates(ranking)], "wide")),
        _section("What it costs", _figures([cost(ranking)], "aside")),
        _section("Every pair", _pairs(ranking)),
        _section("What went wrong", _failures(collection, folder)),
        _section("Members", _members(collection, folder)),
        f"<footer class=soft>cnntrain {cnntrain.__version__}, {datetime.now():%Y-%m-%d %H:%M}. "
        f"To make it anew: <code>{escape(command)}</code></footer>",
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(collection.name)}: {escape(collection.metric)}</title>\n"
        f"<style>\n{asset('page.css').read_text('utf-8')}</style>\n</head>\n<body>\n"
        + "\n".join(filter(None, parts))
        + f"\n<script>\n{asset('page.js').read_text('utf-8')}</script>\n</body>\n</html>\n"
    )


def _head(collection: Collection) -> str:
    chips = "".join(
        f'<li class="{status}">{count} {status}</li>' for status, count in collection.counts.items()
    )
    over = "; ".join(
        f"<code>{escape(option)}</code>: {escape(_values(values))}"
        for option, values in collection.over.items()
    )
    problems = "".join(f'<p class="failed">{escape(p)}</p>' for p in collection.problems)
    what = "A search over" if collection.search is not None else "Compared over"
    return (
        f"<header><h1>{escape(collection.name)}</h1>\n"
        f'<p class="soft">{f"{what} {over}" if over else "Runs that differ in nothing."}</p>\n'
        f'<ul class="chips">{chips}</ul>{problems}</header>'
    )


def _answer(ranking: Ranking) -> str:
    """The result in two lines."""
    collection, best = ranking.collection, ranking.best
    if best is None:
        said = f"No completed member has {escape(collection.metric)} yet."
        return f'<div class="answer"><strong>{said}</strong></div>'
    metric = collection.metric
    alike = [g for g in ranking.ranked if g.against and g.against.verdict not in (DIFFERS,)]
    same = [g for g in alike if g.against and g.against.verdict in ("≈", "tie")]
    said = f"{escape(metric)} {value(metric, best)}{unit(metric)}"
    said += f", n = {best.n}" if best.n > 1 else ""
    if "test/acc" in best.means and metric != "test/acc":
        said += f"; test/acc {number('test/acc', best.means['test/acc'])} %"
    if same:
        places = {id(g): place for place, g in enumerate(ranking.groups, 1)}
        names = "; ".join(f"{places[id(g)]} ({escape(g.label)})" for g in same[:3])
        more = f" and {len(same) - 3} more" if len(same) > 3 else ""
        said += f". Not told apart from it: {names}{more}"
    return (
        f'<div class="answer">Best<strong>{escape(best.label)}</strong>'
        f'<span class="value">{said}.</span></div>'
    )


def _ranking(ranking: Ranking) -> str:
    titles, left = columns(ranking), len(ranking.collection.options) + 1
    words = {*titles[1:left], "n", "verdict"}
    head = [(title, title not in words) for title in titles]
    body = []
    for i, (group, row) in enumerate(zip(ranking.groups, rows(ranking), strict=True)):
        cells = [_cell(text, title not in words) for text, title in zip(row, titles, strict=True)]
        cells[0] = f'<td class="r" data-v="{i + 1}">{_swatch(i)}{escape(row[0])}</td>'
        best = ' class="best"' if group is ranking.best else ""
        body.append(f'<tr data-g="{i}"{best}>{"".join(cells)}</tr>')
    hint = "Point at a row to see its lines in the pictures; click on a title to sort."
    return f'{_table(head, body)}<p class="note">{escape(note(ranking))} {hint}</p>'


def _effects(ranking: Ranking) -> str:
    pictures = effects(ranking)
    if not pictures:
        return ""
    said = (
        f"{escape(ranking.collection.metric)} of every completed member; bar or line: the mean "
        "at a value, over what the values have in common of the other options. Colours as in the "
        "ranking. What is far worse than the rest lies on the edge."
    )
    if (more := len(ranking.collection.options) - MOST_PANELS) > 0:
        said += f" {more} more options are in the tables."
    return f'{_switches(ranking)}<p class="note">{said}</p>{_figures(pictures, "small")}'


def _switches(ranking: Ranking) -> str:
    """What each option with two values brings."""
    metric, found = ranking.collection.metric, switches(ranking)
    if not found:
        return ""
    head = [(title, i > 1) for i, title in enumerate(COLUMNS)]
    body = []
    for switch in found:
        cells = zip(switch.row(metric), head, strict=True)
        body.append(f"<tr>{''.join(_cell(text, right) for text, (_, right) in cells)}</tr>")
    return f'{_table(head, body)}<p class="note">{escape(of_pairs(metric))}</p>'


def _pairs(ranking: Ranking) -> str:
    """The differences between any two groups."""
    groups = ranking.ranked[:MOST_PAIRS]
    if len(groups) < 3 or all(group.n == 1 for group in groups):
        return ""
    metric = ranking.collection.metric
    head = [("", False), *((str(i + 1), True) for i in range(len(groups)))]
    body = []
    for i, (group, line) in enumerate(zip(groups, ranking.pairs(MOST_PAIRS), strict=True)):
        cells = [f'<td data-v="{i + 1}">{_swatch(i)}{i + 1} {escape(group.label)}</td>']
        for pair in line:
            if pair is None:
                cells.append('<td class="r">·</td>')
                continue
            mark = ' class="r different"' if pair.verdict == DIFFERS else ' class="r"'
            p = "no test" if pair.p is None else f"p = {pair.p:.2g}"
            cells.append(f'<td{mark} title="{p}">{difference(metric, pair)}</td>')
        body.append(f'<tr data-g="{i}">{"".join(cells)}</tr>')
    points = "percentage points" if metric.endswith("acc") else "nats"
    said = (
        f"{escape(metric)} of the row less that of the column, in {points}; shaded where Welch's "
        "test tells the two apart (p < 0.05, not corrected for the number of pairs)."
    )
    shown = f" The best {MOST_PAIRS} groups." if len(ranking.ranked) > MOST_PAIRS else ""
    return f'{_table(head, body)}<p class="note">{said}{shown}</p>'


def _members(collection: Collection, folder: Path) -> str:
    options = list(collection.over)
    known = [m for m in METRICS if any(m in member.metrics for member in collection.members)]
    head = [("member", False), ("status", False), *((o, False) for o in options)]
    head += [(f"{m}{unit(m)}", True) for m in known] + [("epochs", True), ("seconds", True)]
    body = []
    for member in collection.members:
        cells = [
            f"<td>{_link(member, folder)}</td>",
            f'<td class="{escape(member.status)}">{escape(member.status)}</td>',
        ]
        cells += [_cell(text(member.values[o]) if o in member.values else "") for o in options]
        cells += [_cell(number(m, member.metrics.get(m)), True) for m in known]
        cells += [_cell(str(member.epochs or ""), True), _cell(duration(member.seconds), True)]
        body.append(f"<tr>{''.join(cells)}</tr>")
    said = "Metrics of the epoch that was tested; of a member that is not completed, of its last."
    return f'{_table(head, body)}<p class="note">{said}</p>'


def _failures(collection: Collection, folder: Path) -> str:
    """What members died of, and what is wrong with their files."""
    found = [
        f'<li><span class="{m.status}">{m.status}</span> {_link(m, folder)}<br>'
        f"<code>{escape(m.error or 'no reason is recorded')}</code></li>"
        for m in collection.members
        if m.error or m.status == "failed"
    ]
    return f'<ul class="failures">{"".join(found)}</ul>' if found else ""


def _link(member: Member, folder: Path) -> str:
    name = escape(member.name)
    if not member.directory.is_dir():
        return name
    path = os.path.relpath(member.directory, folder).replace(os.sep, "/")
    return f'<a href="{quote(path)}/">{name}</a>'


def _cell(content: str, right: bool = False) -> str:
    """A cell that sorts by the number that it begins with, if it does."""
    plain = content.replace("−", "-").replace("–", "")
    leading = re.match(r"[-+]?\d[\d.]*(?:e[-+]?\d+)?(?=$|\s)", plain)
    sort = leading[0] if leading else plain
    side = ' class="r"' if right else ""
    return f'<td{side} data-v="{escape(sort)}">{escape(content)}</td>'


def _table(head: Sequence[tuple[str, bool]], body: Iterable[str]) -> str:
    titles = "".join(f"<th{' class=r' if right else ''}>{escape(t)}</th>" for t, right in head)
    return (
        f'<div class="scroll" tabindex="0"><table><thead><tr>{titles}</tr></thead>\n<tbody>\n'
        + "\n".join(body)
        + "\n</tbody></table></div>"
    )


def _figures(pictures: Sequence[Picture | None], layout: str) -> str:
    found = [
        f"<figure>{picture.svg}<figcaption>{escape(picture.caption)}</figcaption></figure>"
        for picture in pictures
        if picture is not None
    ]
    return f'<div class="{layout}">{"".join(found)}</div>' if found else ""


def _section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>\n{content}</section>" if content else ""


def _swatch(rank: int) -> str:
    """The line that a group has in the pictures."""
    shown = look(rank)
    dashes = "" if shown.dash == "-" else ' stroke-dasharray="7 3"'
    return (
        '<svg class="swatch" viewBox="0 0 22 10" aria-hidden="true"><path d="M0 5H22" fill="none" '
        f'stroke="var(--{THEME[shown.colour]})" stroke-width="3"{dashes}/></svg>'
    )


def _values(values: Sequence[Any]) -> str:
    if len(values) <= 8:
        return ", ".join(map(text, values))
    if all(map(is_number, values)):
        return f"{text(min(values))} to {text(max(values))} ({len(values)} values)"
    return f"{', '.join(map(text, values[:8]))}, … ({len(values)} values)"
