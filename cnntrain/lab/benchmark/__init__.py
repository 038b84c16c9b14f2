"""Convolutions timed side by side.

- `layers.py`: what is timed, and what of it a config or a network says.
- `contenders.py`, `peers.py`: who is timed: backends, and what others unroll with.
- `timing.py`, `memory.py`: how long it takes and how much room, measured.
- `measure.py`: one layer, all contenders. `run.py`: all of them.
- `report.py`: what was found; `tables.py`, `picture.py`: shown.
"""

from cnntrain.lab.benchmark.picture import draw
from cnntrain.lab.benchmark.report import Report
from cnntrain.lab.benchmark.run import benchmark
from cnntrain.lab.benchmark.tables import print_report

__all__ = ["Report", "benchmark", "draw", "print_report"]
