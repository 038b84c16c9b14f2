"""A sweep's folder: its record, the members run in it, its extension; nothing is trained."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from run_folders import tree, write_run
from sweeps_of_records import COMPARE, planned, record, rows, run, sweeping

from cnntrain.config import ConfigError
from cnntrain.config.resume import add_checksum
from cnntrain.sweeps.members import PlannedMember, SweepFolder
from cnntrain.sweeps.records import collect
from cnntrain.sweeps.sweep import Sweep, SweepRunner


def test_record_of_a_sweep(tmp_path: Path) -> None:
    """sweep.json lists all members before the first one starts."""
    under_way = sweeping(tmp_path / "s", *COMPARE, metric="test/loss")
    assert list(tmp_path.iterdir()) == []  # nothing before it runs
    seen: list[Any] = []
    under_way.run(lambda *_: seen.append(record(tmp_path / "s")))
    (content,) = seen
    assert (content["name"], content["metric"]) == ("s", "test/loss")
    assert content["over"] == {"model": ["shallow", "lenet5"], "seed": [0, 1]}
    members = content["members"]
    assert members["model=lenet5,seed=1"]["values"] == {"model": "lenet5", "seed": 1}
    assert len({member["identity"] for member in members.values()}) == 4
    assert [row["status"] for row in rows(tmp_path / "s")] == ["pending"] * 4


def test_only_missing_members_are_run(tmp_path: Path) -> None:
    first, second = "model=shallow,seed=0", "model=shallow,seed=1"
    outcome, launcher, _ = run(tmp_path / "s", *COMPARE, failing=(second,))
    assert len(launcher.launched) == 4
    assert outcome.failed == [second]
    assert [(r["directory"], r["status"], r["error"]) for r in rows(tmp_path / "s")][:2] == [
        (first, "completed", ""),
        (second, "failed", "OSError: no room"),
    ]
    again = sweeping(tmp_path / "s", *reversed(COMPARE))  # the other way round
    assert [member.name for member in again.pending] == [second]
    # A result that was edited is none; a directory with a run of another config is rejected.
    result = tmp_path / "s" / first / "result.json"
    content = json.loads(result.read_text())
    result.write_text(json.dumps({**content, "epochs": 9}))
    assert {m.name for m in sweeping(tmp_path / "s", *COMPARE).pending} == {first, second}
    content.pop("sha256")
    result.write_text(json.dumps(add_checksum({**content, "config_hash": "0" * 16})))
    before = tree(tmp_path)
    with pytest.raises(ConfigError, match=f"{re.escape(first)}: holds another run"):
        sweeping(tmp_path / "s", *COMPARE)
    assert tree(tmp_path) == before


def test_completed_sweep_starts_no_launcher(tmp_path: Path) -> None:
    run(tmp_path / "s", *COMPARE)
    (tmp_path / "s/sweep.csv").unlink()
    outcome, launcher, printed = run(tmp_path / "s", *COMPARE)
    assert (launcher.launched, printed, outcome.failed, outcome.waiting) == ([], [], [], {})
    assert [row["status"] for row in rows(tmp_path / "s")] == ["completed"] * 4


def test_more_values_extend_a_sweep(tmp_path: Path) -> None:
    run(tmp_path / "s", *COMPARE)
    _, launcher, printed = run(tmp_path / "s", "model=shallow,lenet5", "seed=2,1,0")
    assert launcher.launched == ["model=shallow,seed=2", "model=lenet5,seed=2"]
    assert [line[:6] for line in printed] == ["[5/6] ", "[6/6] "]
    assert record(tmp_path / "s")["over"] == {"model": ["shallow", "lenet5"], "seed": [0, 1, 2]}
    # Fewer values are a part of it: the others stay in the record.
    _, launcher, _ = run(tmp_path / "s", "model=shallow", "seed=3,0")
    assert launcher.launched == ["model=shallow,seed=3"]
    assert len(rows(tmp_path / "s")) == 7


def test_another_option_extends_a_sweep(tmp_path: Path) -> None:
    """Completed members keep their directories, and get the value that all had."""
    run(tmp_path / "s", *COMPARE)
    run(tmp_path / "s", "model=shallow", "seed=0", "backend=native,im2col")
    assert [row["backend"] for row in rows(tmp_path / "s")] == [*["native"] * 4, "im2col"]
    more = [*COMPARE, "backend=native,im2col", "optimizer.lr=0.005,0.02"]
    _, launcher, _ = run(tmp_path / "s", *more)
    assert len(launcher.launched) == 11
    found = rows(tmp_path / "s")
    assert list(found[0])[:5] == ["status", "model", "seed", "backend", "optimizer.lr"]
    assert len({tuple(row.values())[1:5] for row in found}) == 16
    assert found[0]["directory"] == "model=shallow,seed=0"
    assert (found[0]["backend"], found[0]["optimizer.lr"]) == ("native", "0.005")
    assert "backend=im2col,model=shallow,optimizer.lr=0.02,seed=1" in {
        row["directory"] for row in found
    }
    _, launcher, _ = run(tmp_path / "s", *more)
    assert launcher.launched == []


def test_launcher_that_raises(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Members that had started have failed; the others are unfinished."""
    under_way = sweeping(tmp_path / "s", *COMPARE)
    begun = tmp_path / "s/model=shallow,seed=0"

    def launch(jobs: Any, task: Any) -> None:
        begun.mkdir()
        raise RuntimeError("the cluster\nis gone")

    under_way.run(launch)
    reason = "RuntimeError: the cluster is gone"
    assert f"\nthe launcher failed: {reason}\n" in capsys.readouterr().out
    assert under_way.failed == [begun.name]
    assert len(under_way.waiting) == 3
    assert [row["status"] for row in rows(tmp_path / "s")] == ["failed", *["pending"] * 3]
    assert rows(tmp_path / "s")[0]["error"] == reason


def test_progress_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    printed: list[str] = []
    monkeypatch.setattr("cnntrain.sweeps.sweep.paragraph", printed.append)
    clock = iter([0.0, 40.0, 50.0, 60.0])
    runner = SweepRunner(SweepFolder(tmp_path), Sweep(metric="val/loss"))
    runner.total, runner.done = 12, 3
    runner.started = next(clock)
    monkeypatch.setattr("cnntrain.sweeps.sweep.time.monotonic", lambda: next(clock))
    runner.waiting |= dict.fromkeys("abcd")
    for called, status in {"a": "completed", "b": "failed", "c": "interrupted"}.items():
        write_run(tmp_path / called, status=status, error="OSError: no room", seconds=7.4)
        runner.check_results()
        runner.check_results()  # once each
    assert printed[0] == "[ 4/12] a: val/loss 0.2000, 7 s; 0:05:20 left"
    assert re.fullmatch(
        r"\[ 5/12\] b: failed: OSError: no room \(.*b/train\.log\); 0:02:55 left", printed[1]
    )
    assert printed[2:] == ["[ 5/12] c: interrupted after 3 epochs"]
    assert list(runner.waiting) == ["c", "d"]
    shutil.rmtree(tmp_path / "c")
    write_run(tmp_path / "c", seconds=7.4)  # started again, as by a cluster that had preempted it
    runner.check_results()
    assert printed[3] == "[ 6/12] c: val/loss 0.2000, 7 s; 0:02:00 left"
    assert list(runner.waiting) == ["d"]


def test_rounds_of_a_search(tmp_path: Path) -> None:
    folder = SweepFolder(tmp_path, search=True)
    for number, lr in enumerate((0.001, 1e-5, 0.5)):
        ((run,), _) = planned("data=fashion_mnist_mini", f"optimizer.lr={lr}")
        trial = PlannedMember(f"trial={number:03},a: b", run, {"optimizer.lr": lr}, number)
        folder.extend([trial], ["optimizer.lr"])
        folder.write("val/acc", {"trials": 3})
    members = SweepFolder(tmp_path, search=True).record.members
    assert [member.values["optimizer.lr"] for member in members.values()] == [0.001, 1e-5, 0.5]
    assert len(collect(tmp_path).members) == 3


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with SweepFolder(tmp_path).locked(), pytest.raises(ConfigError) as caught:
        run(tmp_path, "seed=0,1")
    busy = f"sweep.name={tmp_path.name}: another process is running this sweep"
    assert caught.value.problems[0].startswith(busy)
