"""scripts/reproduce_results.py: its table has the values that its runs measured."""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from conftest import ROOT

from cnntrain.inference import evaluate

SCRIPT = [sys.executable, str(ROOT / "scripts/reproduce_results.py")]


def test_the_table_is_of_the_last_weights_of_all_seeds(tmp_path: Path) -> None:
    options = ["data=fashion_mnist_mini", "+trainer.limit_train_batches=6", "trainer.max_epochs=2"]
    command = [*SCRIPT, "--recipes", "lenet5_quick", "--seeds", "2", "--at-once", "1", *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for attempt in ("trains", "finds them trained"):
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        assert ("2 completed before" in done.stdout) != (attempt == "trains"), done.stdout
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
