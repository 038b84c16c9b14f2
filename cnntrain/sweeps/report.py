"""Report of a sweep as files: a self-contained HTML page with figures, Markdown, CSV."""

import io
import os
import re
import shlex
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup, escape
from matplotlib import rc_context

import cnntrain
from cnntrain.atomic import replacing
from cnntrain.sweeps import figures
from cnntrain.sweeps.ranking import DIFFERS, NOISE, TIE, Ranking, option_effects, rank, text
from cnntrain.sweeps.records import METRICS, Collection, Member, as_typed, is_number
from cnntrain.sweeps.tables import (
    EFFECT_COLUMNS,
    columns,
    csv_text,
    difference,
    duration,
    effect_row,
    effects_note,
    failures,
    headline,
    note,
    number,
    p_value,
    rows,
    unit,
    value,
)

MOST_PAIRS = 16  # groups in the table of pairwise differences
# The style sheet has these colours for light and dark mode.
CSS_VARIABLES = dict(zip(figures.THEME, ("ink", "soft", "grey", "grid", "paper"), strict=True))
CSS_VARIABLES |= {colour: f"c{i}" for i, colour in enumerate(figures.COLOURS)}
TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
)


def write_report(collection: Collection, folder: str | os.PathLike[str]) -> list[Path]:
    """Write report.html, report.md and report.csv; returns their paths. Raises OSError."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    contents = {
        "report.html": html(collection, folder),
        "report.md": markdown(collection),
        "report.csv": group_csv(collection),
    }
    for name, content in contents.items():
        with replacing(folder / name) as file:
            file.write(content.encode())
    return [folder / name for name in contents]


@rc_context(figures.RC)
def html(collection: Collection, folder: Path) -> str:
    """The page. Links to the runs are relative to `folder`."""
    ranking, metric = rank(collection), collection.metric
    effects = option_effects(ranking)
    return TEMPLATES.get_template("report.html.j2").render(
        collection=collection,
        ranking=ranking,
        metric=metric,
        over={option: _values(values) for option, values in collection.over.items()},
        result=_result(ranking),
        columns=columns(ranking),
        rows=rows(ranking),
        note=note(ranking),
        colour=lambda place: CSS_VARIABLES[figures.group_style(place)[0]],
        dashed=lambda place: figures.group_style(place)[1] != "-",
        curves=figures.learning_curves(ranking),
        history=figures.search_history(ranking),
        panels=figures.effect_panels(ranking),
        coordinates=figures.parallel_coordinates(ranking),
        cost=figures.cost(ranking),
        svg=lambda figure: Markup(svg(figure)),
        effect_columns=EFFECT_COLUMNS,
        effects=[effect_row(effect, metric) for effect in effects],
        effects_note=effects_note(metric),
        pairs=_pairs(ranking),
        failed=[m for m in collection.members if m.error or m.status == "failed"],
        link=lambda member: _link(member, folder),
        members=_members(collection),
        version=cnntrain.__version__,
        now=f"{datetime.now():%Y-%m-%d %H:%M}",
        command=shlex.join(["cnntrain", "report", str(collection.folder.absolute())]),
    )


def svg(it: figures.ReportFigure) -> str:
    """A figure as an SVG element whose colours are CSS variables, for light and dark mode."""
    out = io.StringIO()
    with rc_context({**figures.RC, "svg.hashsalt": it.name}):  # ids are unique in the page
        it.figure.savefig(out, format="svg", metadata={"Date": None})
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", out.getvalue(), flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text[text.index("<svg") :])
    (box,) = re.findall(r'viewBox="[^"]*"', text)
    text = f'<svg role="img" aria-label="{escape(it.caption)}" {box}{text[text.index(">") :]}'
    text = text.replace("xlink:href", "href")
    return re.sub("|".join(CSS_VARIABLES), lambda found: f"var(--{CSS_VARIABLES[found[0]]})", text)


def markdown(collection: Collection) -> str:
    """The ranking and the effects of options as Markdown."""
    ranking, metric = rank(collection), collection.metric
    table = markdown_table(columns(ranking), rows(ranking))
    parts = [f"# {collection.name}", _escaped(headline(ranking)), table, note(ranking)]
    if failed := failures(collection):
        parts.append("\n".join(f"- {_escaped(line)}" for line in failed))
    parts += collection.problems
    if effects := option_effects(ranking):
        parts += ["## Effect of each option", effects_note(metric)]
        parts.append(markdown_table(EFFECT_COLUMNS, [effect_row(e, metric) for e in effects]))
    return "\n\n".join(parts) + "\n"


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(_escaped, line))} |" for line in lines)


def group_csv(collection: Collection) -> str:
    """A row per group: accuracies in [0, 1], losses in nats, seconds."""
    ranking, options = rank(collection), collection.options
    spread = [f"{metric} {kind}" for metric in METRICS for kind in ("mean", "std")]
    test = ["difference", "p", "verdict"]
    table: list[list[Any]] = [["rank", *options, "n", "members", *spread, "seconds", *test]]
    for i, g in enumerate(ranking.groups, 1):
        values = [as_typed(g.values[o]) if o in g.values else "" for o in options]
        numbers = [d.get(m) for m in METRICS for d in (g.means, g.deviations)]
        row = [i if g.samples else "", *values, g.n, len(g.members), *numbers, g.seconds]
        best = ["", "", "best"] if g is ranking.best else ["", "", ""]
        against = g.against
        row += [against.difference, against.p, against.verdict] if against else best
        table.append(row)
    return csv_text(table)


def _result(ranking: Ranking) -> str:
    """The best group's metrics, and the groups that are not distinguished from it."""
    metric, best = ranking.collection.metric, ranking.best
    if best is None:
        return f"No completed member has {metric} yet."
    result = f"{metric} {value(metric, best)}{unit(metric)}"
    result += f", n = {best.n}" if best.n > 1 else ""
    if "test/acc" in best.means and metric != "test/acc":
        result += f"; test/acc {number('test/acc', best.means['test/acc'])} %"
    alike = [
        f"{place} ({g.label})"
        for place, g in enumerate(ranking.groups, 1)
        if g.against and g.against.verdict in (NOISE, TIE)
    ]
    if alike:
        result += f". Not distinguished from it: {'; '.join(alike[:3])}"
        result += f" and {len(alike) - 3} more" if len(alike) > 3 else ""
    return f"{result}."


def _pairs(ranking: Ranking) -> list[list[tuple[str, str, bool]]]:
    """Rows of pairwise differences: text, p-value, whether Welch's test distinguishes the two."""
    if len(ranking.ranked) < 3 or all(group.n == 1 for group in ranking.ranked[:MOST_PAIRS]):
        return []
    metric = ranking.collection.metric
    return [
        [
            (difference(metric, pair.difference), p_value(pair), pair.verdict == DIFFERS)
            if pair
            else ("·", "", False)
            for pair in line
        ]
        for line in ranking.pairs(MOST_PAIRS)
    ]


def _members(collection: Collection) -> dict[str, Any]:
    options = list(collection.over)
    known = [m for m in METRICS if any(m in member.metrics for member in collection.members)]
    rows = [
        [text(m.values[o]) if o in m.values else "" for o in options]
        + [number(metric, m.metrics.get(metric)) for metric in known]
        + [str(m.epochs or ""), duration(m.seconds)]
        for m in collection.members
    ]
    head = [*options, *(f"{metric}{unit(metric)}" for metric in known), "epochs", "seconds"]
    return {"head": head, "rows": [*zip(collection.members, rows, strict=True)]}


def _link(member: Member, folder: Path) -> str:
    if not member.directory.is_dir():
        return ""
    return quote(os.path.relpath(member.directory, folder).replace(os.sep, "/")) + "/"


def _values(values: Sequence[Any]) -> str:
    if len(values) <= 8:
        return ", ".join(map(text, values))
    if all(map(is_number, values)):
        return f"{text(min(values))} to {text(max(values))} ({len(values)} values)"
    return f"{', '.join(map(text, values[:8]))}, … ({len(values)} values)"


def _escaped(cell: str) -> str:
    return cell.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
