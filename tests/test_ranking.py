"""Runs collected and ranked: numbers against NumPy, SciPy and by hand, statuses, damaged files."""

import csv
import io
import json
import logging
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from filelock import FileLock
from rich.console import Console
from run_folders import write_run, write_sweep

from cnntrain.config import ConfigError
from cnntrain.config.choices import choice, defaults
from cnntrain.config.resume import seal
from cnntrain.sweeps.collect import Collection, collect, write_csv
from cnntrain.sweeps.ranking import DIFFERS, NOISE, TIE, UNKNOWN, compare, label, rank
from cnntrain.sweeps.record import history
from cnntrain.sweeps.tables import group_csv, markdown, print_ranked

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


def test_choices_as_one_types_them(tmp_path: Path) -> None:
    """What only one of the choices has, or has as its default, is no option that varies."""
    write_run(tmp_path / "a", ["model=lenet5", "optimizer=adam", "scheduler=none"])
    write_run(tmp_path / "b", ["model=shallow", "optimizer=sgd"])
    write_run(tmp_path / "c", ["model=shallow", "optimizer=sgd", "optimizer.lr=0.3"])
    write_run(tmp_path / "d", ["trainer.checkpoint_every_n_steps=7", "+optimizer.amsgrad=true"])
    values = {member.name: member.values for member in collect(tmp_path).members}
    common = {"seed": 0}
    assert values["a"] == common | {
        "model": "lenet5", "optimizer": "adam", "scheduler": "none", "optimizer.lr": 0.005,
    }  # fmt: skip
    assert values["b"]["optimizer.lr"] == 0.05
    assert values["c"]["optimizer.lr"] == 0.3
    assert values["d"]["optimizer.amsgrad"] is True
    assert values["d"]["scheduler"] == "one_cycle"
    assert set().union(*values.values()) == {
        "model", "optimizer", "optimizer.lr", "optimizer.amsgrad", "scheduler", "seed",
    }  # fmt: skip


def test_names_of_choices() -> None:
    assert choice("backend", {"_target_": "cnntrain.conv.Im2colConv2d"}) == "im2col"
    assert choice("backend", {"_target_": "mypkg.MyConv2d"}) == "mypkg.MyConv2d"
    assert choice("scheduler", None) == choice("scheduler", {}) == "none"
    assert choice("loss", {"_target_": "torch.nn.CrossEntropyLoss"}) == "torch.nn.CrossEntropyLoss"
    trainer = {**defaults("trainer", "auto"), "accelerator": "gpu"}
    assert choice("trainer", trainer) == "gpu"
    assert defaults("trainer", "cpu")["max_epochs"] == 10  # of the file that it is based on


def test_statuses(tmp_path: Path) -> None:
    names = ["done", "none", "running", "killed", "cut", "begun"]
    members = {f"backend={n}": {"backend": n, "seed": 0} for n in names}
    write_sweep(tmp_path, {"backend": names, "seed": [0]}, members)
    write_run(tmp_path / "backend=done")
    write_run(tmp_path / "backend=running", status="running", val=[0.1, 0.2])
    write_run(tmp_path / "backend=killed", status="running", val=[0.1, 0.3, 0.4])
    (tmp_path / "backend=killed/.lock").touch()
    with (tmp_path / "backend=killed/metrics.csv").open("a") as file:
        file.write("3,40,0.0")  # half a row
    write_run(tmp_path / "backend=cut", status="interrupted")
    (tmp_path / "backend=begun/.hydra").mkdir(parents=True)
    (tmp_path / "backend=begun/.hydra/config.yaml").touch()
    with FileLock(tmp_path / "backend=running/.lock"):
        found = {m.values["backend"]: m for m in collect(tmp_path).members}
    assert {name: member.status for name, member in found.items()} == {
        "done": "completed",
        "none": "pending",
        "running": "running",
        "killed": "interrupted",
        "cut": "interrupted",
        "begun": "interrupted",
    }
    assert (found["killed"].epochs, found["killed"].metrics["val/acc"]) == (3, 0.4)
    assert found["none"].metrics == {}


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


@pytest.mark.parametrize(
    "sheet",
    ["", "[]", "name: a", "name: a\nmetric: val/lss\nover: {}\nmembers: {}",
     "name: a\nmetric: val/acc\nover: {seed: 1}\nmembers: {}",
     "name: a\nmetric: val/acc\nover: {}\nmembers: {m: {values: 3}}", "\x00"],
)  # fmt: skip
def test_a_damaged_sheet_hides_no_run(tmp_path: Path, sheet: str) -> None:
    write_run(tmp_path / "run")
    (tmp_path / "sweep.yaml").write_text(sheet)
    collection = collect(tmp_path)
    assert [member.status for member in collection.members] == ["completed"]
    assert collection.problems[0].startswith(f"{tmp_path / 'sweep.yaml'}: is damaged")


def test_folders_that_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder, said in {
        tmp_path / "nowhere": "is not a folder",
        tmp_path / "file": "is not a folder",
        tmp_path: "holds no run",
    }.items():
        with pytest.raises(ConfigError, match=said):
            collect(folder)
    with pytest.raises(ConfigError, match="metric=acc: is no metric; there is val/acc, val/loss"):
        collect(tmp_path, "acc")


def test_a_run_itself(tmp_path: Path) -> None:
    write_run(tmp_path / "run", seed=3)
    (member,) = collect(tmp_path / "run").members
    assert (member.name, member.values, member.seconds) == ("run", {"seed": 3}, 10.0)


def test_values_each_once_in_their_order(tmp_path: Path) -> None:
    members = {f"m{i}": {"x": x} for i, x in enumerate([3, 1, True, "1", None, 3])}
    write_sweep(tmp_path, {"x": [3, 0]}, members)
    assert [repr(x) for x in collect(tmp_path).over["x"]] == ["3", "0", "1", "True", "None"]


def test_a_row_for_each_member(tmp_path: Path) -> None:
    names = [f"backend={b},seed={s}" for b in ("native", "im2col") for s in (0, 1)]
    members = {n: dict(part.split("=") for part in n.split(",")) for n in names}
    write_sweep(tmp_path, {"backend": ["native", "im2col"], "seed": ["0", "1"]}, members)
    write_run(tmp_path / names[0], val=[0.7512345678901234])
    write_run(tmp_path / names[1], status="failed", error='a "quoted", thing')
    write_csv(collect(tmp_path), tmp_path / "sweep.csv")
    rows = list(csv.DictReader((tmp_path / "sweep.csv").read_text().splitlines()))
    assert [row["directory"] for row in rows] == names
    assert [row["status"] for row in rows] == ["completed", "failed", "pending", "pending"]
    assert float(rows[0]["val/acc"]) == 0.7512345678901234
    assert (rows[0]["backend"], rows[0]["seed"], rows[0]["seconds"]) == ("native", "0", "10.0")
    assert rows[1]["error"] == 'a "quoted", thing'
    assert rows[3]["val/acc"] == rows[3]["seconds"] == ""


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
        "import sys; from pathlib import Path; from cnntrain.sweeps.collect import collect;"
        "from cnntrain.sweeps.report import write_report;"
        "write_report(collect(Path(sys.argv[1])), Path(sys.argv[1]) / 'report');"
        "print('torch' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert (done.stdout, done.stderr) == ("False\n", "")


def test_a_forged_seal(tmp_path: Path) -> None:
    """Whatever is in a result, it is the run's only with its checksum."""
    write_run(tmp_path / "a")
    content = json.loads((tmp_path / "a/result.json").read_text())
    content["status"] = "failed"
    (tmp_path / "a/result.json").write_text(json.dumps(content))
    assert collect(tmp_path).members[0].status == "damaged"
    del content["sha256"]
    (tmp_path / "a/result.json").write_text(json.dumps(seal(content)))
    assert collect(tmp_path).members[0].status == "failed"


def shown(collection: Collection) -> str:
    """The table of the terminal, its lines joined."""
    out = io.StringIO()
    print_ranked(collection, Console(file=out, width=400))
    return out.getvalue()
