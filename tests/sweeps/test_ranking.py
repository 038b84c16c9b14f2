"""Runs ranked: numbers against NumPy, SciPy and by hand."""

import contextlib
import csv
import io
import logging
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from run_folders import write_run

from cnntrain.sweeps.ranking import DIFFERS, NOISE, TIE, UNKNOWN, compare, label, rank
from cnntrain.sweeps.records import Collection, collect, history
from cnntrain.sweeps.report import group_csv, markdown
from cnntrain.sweeps.tables import print_ranked

NATIVE, IM2COL, NAIVE = [0.90, 0.92, 0.91], [0.91, 0.93, 0.905], [0.80, 0.81, 0.83]


def a_comparison(folder: Path) -> None:
    """Three backends by three seeds, without sweep.yaml."""
    for backend, values in {"native": NATIVE, "im2col": IM2COL, "naive": NAIVE}.items():
        for seed, value in enumerate(values):
            write_run(
                folder / f"{backend}_{seed}",
                [f"backend={backend}"],
                seed=seed,
                val=[0.5, value],
                seconds=10.0 + seed,
            )


def test_groups_against_numpy_and_scipy(tmp_path: Path) -> None:
    a_comparison(tmp_path)
    collection = collect(tmp_path)
    assert (collection.metric, collection.maximise) == ("val/acc", True)
    assert collection.over == {"backend": ["im2col", "naive", "native"], "seed": [0, 1, 2]}
    groups = rank(collection).groups
    assert [group.values for group in groups] == [
        {"backend": "im2col"},
        {"backend": "native"},
        {"backend": "naive"},
    ]
    for group, values in zip(groups, [IM2COL, NATIVE, NAIVE], strict=True):
        assert group.n == group.planned == 3
        assert group.mean == pytest.approx(np.mean(values))
        assert group.deviation == pytest.approx(np.std(values, ddof=1))
        assert group.means["test/acc"] == pytest.approx(np.mean(values) - 0.01)
        assert group.means["val/loss"] == pytest.approx(1.1 - np.mean(values))
        assert group.seconds == pytest.approx(11.0)
    assert groups[0].against is None
    for group, values, verdict in [(groups[1], NATIVE, NOISE), (groups[2], NAIVE, DIFFERS)]:
        assert group.against is not None
        # Welch 1947, by hand: t and the degrees of freedom of Welch and Satterthwaite.
        a, b = (np.var(x, ddof=1) / 3 for x in (values, IM2COL))
        t = (np.mean(values) - np.mean(IM2COL)) / math.sqrt(a + b)
        freedom = (a + b) ** 2 / (a**2 / 2 + b**2 / 2)
        assert group.against.p == pytest.approx(2 * scipy.stats.t.sf(abs(t), freedom))
        assert group.against.difference == pytest.approx(np.mean(values) - np.mean(IM2COL))
        assert group.against.verdict == verdict


def test_losses_rank_the_lowest_first(tmp_path: Path) -> None:
    a_comparison(tmp_path)
    ranking = rank(collect(tmp_path, "val/loss"))
    assert [group.values["backend"] for group in ranking.groups] == ["im2col", "native", "naive"]
    means = [group.mean for group in ranking.groups]
    assert means == sorted(means)
    assert ranking.groups[1].against is not None
    assert ranking.groups[1].against.difference > 0


@pytest.mark.parametrize(
    ("a", "b", "verdict"),
    [
        ([0.9], [0.8, 0.8], UNKNOWN),
        ([0.9, 0.91], [0.8], UNKNOWN),
        ([0.9, 0.9], [0.9, 0.9], TIE),
        ([0.9, 0.9], [0.8, 0.8], DIFFERS),  # seeds change nothing, the option does
        ([0.9, 0.8, 0.7], [0.7, 0.9, 0.8], TIE),
        ([0.9, 0.9], [0.89, 0.91], NOISE),
        ([0.9, 0.9], [0.7, 0.71], DIFFERS),
    ],
)
def test_what_chance_explains(a: list[float], b: list[float], verdict: str) -> None:
    found = compare(a, b)
    assert found.verdict == verdict
    assert found.difference == pytest.approx(sum(a) / len(a) - sum(b) / len(b))
    back = compare(b, a)
    assert (back.verdict, back.p) == (verdict, found.p)


def test_every_pair(tmp_path: Path) -> None:
    a_comparison(tmp_path)
    pairs = rank(collect(tmp_path)).pairs(2)
    assert [[pair and round(pair.difference, 6) for pair in row] for row in pairs] == [
        [None, 0.005],
        [-0.005, None],
    ]
    pair = pairs[0][1]
    assert pair is not None
    assert pair.p == pytest.approx(scipy.stats.ttest_ind(IM2COL, NATIVE, equal_var=False).pvalue)


def test_what_has_no_value_is_counted_not_dropped(tmp_path: Path) -> None:
    a_comparison(tmp_path)
    write_run(tmp_path / "f", ["backend=native"], seed=3, status="failed", error="boom")
    write_run(tmp_path / "p", ["backend=native"], seed=4, status="pruned")
    nan = {"val/acc": math.nan}
    write_run(tmp_path / "n", ["backend=native"], seed=5, metrics=nan)
    write_run(tmp_path / "again", ["backend=native"], seed=0, val=[0.94])
    (native,) = (g for g in rank(collect(tmp_path)).groups if g.values["backend"] == "native")
    assert (native.n, native.planned, len(native.members)) == (3, 6, 7)
    # A seed that was run twice is one sample, the mean of the two: (0.90 + 0.94) / 2.
    assert sorted(native.samples) == pytest.approx([0.91, 0.92, 0.92])
    text = shown(collect(tmp_path))
    assert "3 of 6" in text
    assert "failed: f: boom" in text
    assert "11 completed, 1 pruned, 1 failed" in text


def test_a_group_of_which_all_failed_is_last(tmp_path: Path) -> None:
    a_comparison(tmp_path)
    write_run(tmp_path / "f", ["backend=naive", "optimizer.lr=9"], status="failed", val=[])
    ranking = rank(collect(tmp_path))
    assert ranking.groups[-1].values == {"backend": "naive", "optimizer.lr": 9}
    assert ranking.groups[-1].mean is ranking.groups[-1].against is None
    assert len(ranking.ranked) == 3


def test_all_failed(tmp_path: Path) -> None:
    write_run(tmp_path / "a", seed=0, status="failed", error="boom")
    write_run(tmp_path / "b", seed=1, status="interrupted")
    assert rank(collect(tmp_path)).best is None
    assert "no completed member has val/acc yet (1 interrupted, 1 failed)" in shown(
        collect(tmp_path)
    )


def test_damaged_files_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    a_comparison(tmp_path)
    result, config = tmp_path / "native_0/result.json", tmp_path / "naive_1/.hydra/config.yaml"
    result.write_text(result.read_text().replace("0.9", "0.99"))
    config.write_text("{{{")
    other = tmp_path / "naive_2/.hydra/config.yaml"
    other.write_text(other.read_text().replace("lr: 0.005", "lr: 0.006"))
    (tmp_path / "im2col_0/metrics.csv").write_bytes(b"\xff\xfe\x00,\n")
    (tmp_path / "sweep.yaml").write_text("name: [")
    with caplog.at_level(logging.WARNING):
        collection = collect(tmp_path)
        text = shown(collection)
    assert caplog.text == ""  # it is in the report, once
    damaged = {m.name: m.error for m in collection.members if m.status == "damaged"}
    assert damaged.keys() == {"native_0", "naive_1", "naive_2"}
    assert damaged["native_0"] == f"{result}: is damaged or was edited by hand"
    assert damaged["naive_1"] == f"{config}: is damaged or not the run's"
    assert all(f"damaged: {name}" in text for name in damaged)
    assert f"{tmp_path / 'sweep.yaml'}: is damaged" in text
    groups = {g.values.get("backend"): g.n for g in rank(collection).groups}
    assert groups == {"im2col": 3, "native": 2, "naive": 1}
    assert history(tmp_path / "im2col_0") == []


def test_the_table_s_forms_agree(tmp_path: Path) -> None:
    a_comparison(tmp_path)
    collection = collect(tmp_path)
    rows = list(csv.DictReader(io.StringIO(group_csv(collection))))
    assert [row["backend"] for row in rows] == ["im2col", "native", "naive"]
    assert float(rows[0]["val/acc std"]) == pytest.approx(np.std(IM2COL, ddof=1))
    assert float(rows[2]["difference"]) == pytest.approx(np.mean(NAIVE) - np.mean(IM2COL))
    assert [row["verdict"] for row in rows] == ["best", "≈", "differs"]
    lines = [line for line in markdown(collection).splitlines() if line.startswith("|")]
    assert lines[2].split("|")[2:4] == [" im2col ", " 91.50 ± 1.32 "]
    assert len({line.count("|") for line in lines}) == 1
    text = shown(collection)
    assert "best by val/acc is im2col, 91.50 ± 1.32 % (n = 3)" in text
    assert "1 other is within noise of it" in text
    p = scipy.stats.ttest_ind(IM2COL, NATIVE, equal_var=False).pvalue
    assert f"≈ p = {p:.2g}" in text
    assert "few seeds" in text


def test_one_seed_tells_nothing(tmp_path: Path) -> None:
    write_run(tmp_path / "a", ["backend=naive"])
    write_run(tmp_path / "b", ["backend=native"], val=[0.99])
    text = shown(collect(tmp_path))
    assert "n = 1 in every row" in text
    assert "±" not in text
    assert "test set" not in text
    assert "Ranked on the test set" in shown(collect(tmp_path, "test/acc"))


def test_labels() -> None:
    values = {
        "backend": "im2col",
        "optimizer.lr": 0.00312345,
        "model.norm": False,
        "model.act": "relu",
    }
    assert label(values) == "im2col, lr=0.003123, norm=false, act=relu"


def test_torch_is_not_imported(tmp_path: Path) -> None:
    write_run(tmp_path / "a")
    code = (
        "import sys; from pathlib import Path; from cnntrain.sweeps.records import collect;"
        "from cnntrain.sweeps.report import write_report;"
        "write_report(collect(Path(sys.argv[1])), Path(sys.argv[1]) / 'report');"
        "print('torch' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert (done.stdout, done.stderr) == ("False\n", "")


def shown(collection: Collection) -> str:
    """The table of the terminal, its lines joined."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        print_ranked(collection)
    return out.getvalue()
