"""Ranking of runs: numbers against NumPy, SciPy and by hand."""

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

from cnntrain.sweeps.ranking import Group, rank, welch_p
from cnntrain.sweeps.records import Collection, collect, history
from cnntrain.sweeps.tables import columns, group_csv, markdown, print_ranked, rows

NATIVE, IM2COL, NAIVE = [0.90, 0.92, 0.91], [0.91, 0.93, 0.905], [0.80, 0.81, 0.83]


def write_comparison(folder: Path) -> None:
    """Three backends by three seeds, without sweep.json."""
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
    write_comparison(tmp_path)
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
        assert group.mean() == pytest.approx(np.mean(values))
        assert group.deviation() == pytest.approx(np.std(values, ddof=1))
        assert group.mean("test/acc") == pytest.approx(np.mean(values) - 0.01)
        assert group.mean("val/loss") == pytest.approx(1.1 - np.mean(values))
        assert group.mean("seconds") == pytest.approx(11.0)
        assert group.deviation("seconds") == pytest.approx(1.0)
    assert groups[0].p is groups[0].difference is None
    verdicts = [row[-1].split()[0] for row in rows(rank(collection))]
    assert verdicts == ["best", "≈", "differs"]
    for group, values in [(groups[1], NATIVE), (groups[2], NAIVE)]:
        # Welch 1947, by hand: t and the degrees of freedom of Welch and Satterthwaite.
        a, b = (np.var(x, ddof=1) / 3 for x in (values, IM2COL))
        t = (np.mean(values) - np.mean(IM2COL)) / math.sqrt(a + b)
        freedom = (a + b) ** 2 / (a**2 / 2 + b**2 / 2)
        assert group.p == pytest.approx(2 * scipy.stats.t.sf(abs(t), freedom))
        assert group.difference == pytest.approx(np.mean(values) - np.mean(IM2COL))


def test_means_over_classes_rank_the_highest_first(tmp_path: Path) -> None:
    for backend, value in {"native": 0.7, "im2col": 0.8}.items():
        metrics = {"val/macro_f1": value, "test/macro_f1": value - 0.125}
        write_run(tmp_path / backend, [f"backend={backend}"], val=[1 - value], metrics=metrics)
    ranking = rank(collect(tmp_path, "val/macro_f1"))
    assert [group.values["backend"] for group in ranking.groups] == ["im2col", "native"]
    shown = dict(zip(columns(ranking), rows(ranking)[1], strict=True))
    assert (shown["val/macro_f1 %"], shown["test/macro_f1 %"]) == ("70.00", "57.50")
    assert (shown["val/acc %"], shown["− best"]) == ("30.00", "−10.00")
    table = list(csv.DictReader(io.StringIO(group_csv(ranking.collection))))
    assert float(table[0]["test/macro_f1 mean"]) == pytest.approx(0.675)


def test_losses_rank_the_lowest_first(tmp_path: Path) -> None:
    write_comparison(tmp_path)
    ranking = rank(collect(tmp_path, "val/loss"))
    assert [group.values["backend"] for group in ranking.groups] == ["im2col", "native", "naive"]
    means = [group.mean() for group in ranking.groups]
    assert means == sorted(means, key=float)
    assert (ranking.groups[1].difference or 0) > 0


@pytest.mark.parametrize(
    ("a", "b", "low", "high"),
    [
        ([0.9, 0.9], [0.9, 0.9], 1, 1),
        ([0.9, 0.9], [0.8, 0.8], 0, 1e-6),  # without variance
        ([0.9, 0.8, 0.7], [0.7, 0.9, 0.8], 1, 1),
        ([0.9, 0.9], [0.89, 0.91], 0.05, 1),
        ([0.9, 0.9], [0.7, 0.71], 0, 0.05),
    ],
)
def test_p_values(a: list[float], b: list[float], low: float, high: float) -> None:
    found = welch_p(a, b)
    assert found is not None
    assert low - 1e-9 <= found <= high + 1e-9
    assert welch_p(b, a) == found
    assert welch_p(a, b[:1]) is welch_p(a[:1], b) is None


def test_members_without_a_value_are_counted(tmp_path: Path) -> None:
    write_comparison(tmp_path)
    write_run(tmp_path / "f", ["backend=native"], seed=3, status="failed", error="boom")
    write_run(tmp_path / "p", ["backend=native"], seed=4, status="pruned")
    nan = {"val/acc": math.nan}
    write_run(tmp_path / "n", ["backend=native"], seed=5, metrics=nan)
    write_run(tmp_path / "again", ["backend=native"], seed=0, val=[0.94])
    (native,) = (g for g in rank(collect(tmp_path)).groups if g.values["backend"] == "native")
    assert (native.n, native.planned, len(native.members)) == (3, 6, 7)
    # A seed that was run twice is one sample, the mean of the two: (0.90 + 0.94) / 2.
    assert sorted(native.samples["val/acc"]) == pytest.approx([0.91, 0.92, 0.92])
    text = shown(collect(tmp_path))
    assert "3 of 6" in text
    assert "failed: f: boom" in text
    assert "11 completed, 1 pruned, 1 failed" in text


def test_a_failed_group_is_last(tmp_path: Path) -> None:
    write_comparison(tmp_path)
    write_run(tmp_path / "f", ["backend=naive", "optimizer.lr=9"], status="failed", val=[])
    ranking = rank(collect(tmp_path))
    assert ranking.groups[-1].values == {"backend": "naive", "optimizer.lr": 9}
    assert ranking.groups[-1].mean() is ranking.groups[-1].p is None
    assert len(ranking.ranked) == 3


def test_all_failed(tmp_path: Path) -> None:
    write_run(tmp_path / "a", seed=0, status="failed", error="boom")
    write_run(tmp_path / "b", seed=1, status="interrupted")
    assert rank(collect(tmp_path)).best is None
    assert "no completed member has val/acc yet (1 interrupted, 1 failed)" in shown(
        collect(tmp_path)
    )


def test_damaged_files_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_comparison(tmp_path)
    result, config = tmp_path / "native_0/result.json", tmp_path / "naive_1/.hydra/config.yaml"
    result.write_text(result.read_text().replace("0.9", "0.99"))
    config.write_text("{{{")
    other = tmp_path / "naive_2/.hydra/config.yaml"
    other.write_text(other.read_text().replace("lr: 0.005", "lr: 0.006"))
    (tmp_path / "im2col_0/metrics.csv").write_bytes(b"\xff\xfe\x00,\n")
    with caplog.at_level(logging.WARNING):
        collection = collect(tmp_path)
        text = shown(collection)
    assert caplog.text == ""  # reported once
    damaged = {m.name: m.error for m in collection.members if m.status == "damaged"}
    assert damaged.keys() == {"native_0", "naive_1", "naive_2"}
    assert damaged["native_0"] == f"{result}: is damaged or was edited by hand"
    assert damaged["naive_1"] == f"{config}: is damaged or not the run's"
    assert all(f"damaged: {name}" in text for name in damaged)
    groups = {g.values.get("backend"): g.n for g in rank(collection).groups}
    assert groups == {"im2col": 3, "native": 2, "naive": 1}
    assert history(tmp_path / "im2col_0") == []


def test_terminal_markdown_and_csv_agree(tmp_path: Path) -> None:
    write_comparison(tmp_path)
    collection = collect(tmp_path)
    table = list(csv.DictReader(io.StringIO(group_csv(collection))))
    assert [row["backend"] for row in table] == ["im2col", "native", "naive"]
    assert float(table[0]["val/acc std"]) == pytest.approx(np.std(IM2COL, ddof=1))
    assert float(table[2]["difference"]) == pytest.approx(np.mean(NAIVE) - np.mean(IM2COL))
    assert [row["p"] == "" for row in table] == [True, False, False]
    lines = [line for line in markdown(collection).splitlines() if line.startswith("|")]
    assert lines[2].split("|")[2:4] == [" im2col ", " 91.50 ± 1.32 "]
    assert len({line.count("|") for line in lines}) == 1
    text = shown(collection)
    assert "best by val/acc is im2col, 91.50 ± 1.32 % (n = 3)" in text
    assert "1 other is within noise of it" in text
    p = scipy.stats.ttest_ind(IM2COL, NATIVE, equal_var=False).pvalue
    assert f"≈ p = {p:.2g}" in text
    assert "few seeds" in text


def test_one_seed(tmp_path: Path) -> None:
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
    assert Group(values, (), "val/acc", {}).label == "im2col, lr=0.003123, norm=false, act=relu"


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
    """What is printed."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        print_ranked(collection)
    return out.getvalue()
