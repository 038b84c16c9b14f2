"""`cnntrain report`: the ranking of a folder of runs on the terminal, and the report's files."""

import logging
import sys
from pathlib import Path

from cnntrain.commands.app import exit_with_os_error, exit_with_problems, short
from cnntrain.config import ConfigError, folder_problem
from cnntrain.config.errors import unknown
from cnntrain.metric_names import METRICS
from cnntrain.sweeps.records import collect

OPTIONS = ("metric", "out")
HELP = f"""\
Rank the runs of a sweep, or all runs below a folder: a table, and a page with figures.

cnntrain report FOLDER [option=value ...]

  cnntrain report outputs/sweeps/compare             finished or not
  cnntrain report outputs metric=val/loss            any folder with runs below it

Runs that differ only in the seed are one group: mean, standard deviation, and Welch's t-test
against the best group. FOLDER/report/ holds report.html, report.md and report.csv.

== Options ==
metric: for the ranking; by default the sweep's: {", ".join(METRICS)}
        (accuracies: the highest first; losses: the lowest)
out:    a folder for the report's files instead of FOLDER/report
"""


def main() -> None:
    if not sys.argv[1:] or {"--help", "-h"} & set(sys.argv[1:]):
        print(HELP, end="")
        sys.exit(0 if sys.argv[1:] else 2)
    logging.getLogger("cnntrain.config.resume").setLevel(logging.ERROR)  # also in the report
    try:
        folder, options = _parse(sys.argv[1:])
        collection = collect(folder, options.get("metric"))
        done = [m for m in collection.members if m.status == "completed"]
        known = [name for name in METRICS if any(name in m.metrics for m in done)]
        if done and collection.metric not in known:
            there_is = f"no run has it; there is {', '.join(known)}"
            raise ConfigError([f"metric={collection.metric}: {there_is}"])
    except ConfigError as error:
        exit_with_problems(error)
    from cnntrain.sweeps.report import write_report
    from cnntrain.sweeps.tables import print_ranked

    print_ranked(collection)
    try:
        files = write_report(collection, options.get("out", folder / "report"))
    except OSError as error:
        exit_with_os_error(error, "; out=<folder> writes elsewhere")
    print("\n" + "\n".join(short(file) for file in files))


def _parse(arguments: list[str]) -> tuple[Path, dict[str, str]]:
    """The folder and the options. Raises ConfigError."""
    folders, options, problems = [], {}, []
    for text in arguments:
        name, equals, value = text.partition("=")
        if Path(text).is_dir() or not equals or "/" in name:  # a member's folder has = in it
            folders.append(text)
        elif name in OPTIONS:
            options[name] = value
        else:
            problems.append(f"{text}: {unknown('report has', 'option', name, OPTIONS)}")
    if len(folders) != 1:
        given = " ".join(folders) if folders else "no folder"
        problems.append(f"{given}: give one folder with runs below it")
    if "out" in options and (problem := folder_problem(options["out"], "out")):
        problems.append(problem)
    if problems:
        raise ConfigError(problems)
    return Path(folders[0]), options
