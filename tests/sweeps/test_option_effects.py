"""Effects of options with two values, over pairs of members that differ in nothing else."""

from pathlib import Path
from statistics import fmean, stdev

import pytest
from run_folders import write_run, write_sweep

from cnntrain.sweeps.ranking import option_effects, rank
from cnntrain.sweeps.records import collect
from cnntrain.sweeps.report import write_report
from cnntrain.sweeps.tables import effect_row

SCORES = {  # backend, norm, seed -> val/acc
    ("native", True, 0): 0.90,
    ("native", True, 1): 0.91,
    ("native", False, 0): 0.80,
    ("native", False, 1): 0.84,
    ("im2col", True, 0): 0.905,
    ("im2col", True, 1): 0.90,
    ("im2col", False, 0): 0.81,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    sweep = tmp_path / "sweep"
    members = {}
    for (backend, norm, seed), score in SCORES.items():
        values = {"backend": backend, "model.norm": norm, "seed": seed}
        name = f"{backend},{norm},{seed}"
        members[name] = values
        options = [f"backend={backend}", f"model.norm={str(norm).lower()}"]
        write_run(sweep / name, options, seed=seed, val=[score])
    over = {"backend": ["native", "im2col"], "model.norm": [True, False], "seed": [0, 1]}
    write_sweep(sweep, over, members)
    return sweep


def test_effects_are_means_over_pairs(folder: Path) -> None:
    norm, backend = option_effects(rank(collect(folder)))
    gains = [0.90 - 0.80, 0.91 - 0.84, 0.905 - 0.81]  # im2col, seed 1 is in no pair
    assert (norm.option, norm.value, norm.instead) == ("model.norm", True, False)
    assert sorted(norm.gains) == pytest.approx(sorted(gains))
    assert effect_row(norm, "val/acc") == [
        "model.norm=true",
        "false",
        f"+{100 * fmean(gains):.2f} ± {100 * stdev(gains):.2f}",
        "3",
        "3",
    ]
    pairs = [0.905 - 0.90, 0.90 - 0.91, 0.81 - 0.80]
    assert (backend.value, backend.instead) == ("im2col", "native")
    assert sorted(backend.gains) == pytest.approx(sorted(pairs))
    assert effect_row(backend, "val/acc")[-1] == "2"


def test_effects_on_a_loss(folder: Path) -> None:
    norm, _ = option_effects(rank(collect(folder, "val/loss")))
    assert norm.value is True  # run_folders makes the loss 1.1 less the accuracy
    assert norm.gain == pytest.approx(fmean([0.10, 0.07, 0.095]))


def test_effects_in_the_report(folder: Path) -> None:
    write_report(collect(folder), folder / "report")
    text = (folder / "report/report.md").read_text()
    assert "| model.norm=true | false | +8.83 ± 1.61 | 3 | 3 |" in text
    assert "model.norm=true</td>" in (folder / "report/report.html").read_text()
