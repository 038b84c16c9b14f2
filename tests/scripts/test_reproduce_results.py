"""scripts/reproduce_results.py: its table has the values that its runs measured."""

import json
import statistics
import subprocess
from pathlib import Path

import pytest
import reproduce_results
from forked import run_command

from cnntrain.inference import evaluate


def test_the_table_is_of_the_last_weights_of_all_seeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = []

    def run(command: list[str]) -> subprocess.CompletedProcess[str]:
        done = run_command(["train", *command[2:], "tensorboard=scalars"], tmp_path)
        assert done.returncode == 0, done.stderr
        shown.append(done.stdout)
        return done

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.chdir(tmp_path)
    options = ["data=fashion_mnist_mini", "+trainer.limit_train_batches=6", "trainer.max_epochs=2"]
    arguments = ["--recipes", "lenet5_quick", "--seeds", "2", "--at-once", "1", *options]
    monkeypatch.setattr("sys.argv", ["reproduce_results.py", *arguments])
    for _ in range(2):
        reproduce_results.main()
    assert ["2 completed before" in text for text in shown] == [False, True]
    folder = tmp_path / "outputs/sweeps/results_lenet5_quick"
    runs = sorted(file.parent for file in folder.glob("*/result.json"))
    results = [json.loads((run / "result.json").read_text()) for run in runs]
    assert [result["tested_epoch"] for result in results] == [2, 2]
    plain = [100 * result["metrics"]["test/acc"] for result in results]
    flipped = [100 * evaluate(run, checkpoint="last", tta="flip").accuracy for run in runs]
    lines = (tmp_path / "outputs/sweeps/results.md").read_text().splitlines()
    assert len(lines) == 3
    cells = [cell.strip() for cell in lines[2].split("|")[1:-1]]
    wanted = [f"{statistics.mean(a):.2f} ± {statistics.stdev(a):.2f}" for a in (plain, flipped)]
    assert cells[0] == "`experiment=lenet5_quick`"
    assert cells[1:3] == wanted
    assert cells[4:7] == ["2", "65,886", "2"]
