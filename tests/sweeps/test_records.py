"""Records of a folder of runs: statuses, varying options, damaged files."""

import csv
import json
from pathlib import Path

import pytest
from filelock import FileLock
from run_folders import write_run, write_sweep

from cnntrain.config import ConfigError
from cnntrain.config.options import choice, defaults
from cnntrain.config.resume import add_checksum
from cnntrain.sweeps.records import collect
from cnntrain.sweeps.tables import write_member_csv


def test_varying_options(tmp_path: Path) -> None:
    """Without options that have one value for each choice."""
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


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"name": "a", "metric": "val/lss"}', '{"name": "a", "over": 3}', "\x00"],
)
def test_damaged_record_of_a_sweep(tmp_path: Path, content: str) -> None:
    write_run(tmp_path / "run")
    (tmp_path / "sweep.json").write_text(content)
    with pytest.raises(ConfigError, match=r"sweep\.json: is damaged; move it away"):
        collect(tmp_path)
    (tmp_path / "sweep.json").unlink()
    assert [member.status for member in collect(tmp_path).members] == ["completed"]


def test_invalid_folders(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder, problem in {
        tmp_path / "nowhere": "is not a folder",
        tmp_path / "file": "is not a folder",
        tmp_path: "holds no run",
    }.items():
        with pytest.raises(ConfigError, match=problem):
            collect(folder)
    with pytest.raises(ConfigError, match="metric=acc: is no metric; there is val/acc, val/loss"):
        collect(tmp_path, "acc")


def test_folder_of_one_run(tmp_path: Path) -> None:
    write_run(tmp_path / "run", seed=3)
    (member,) = collect(tmp_path / "run").members
    assert (member.name, member.values, member.seconds) == ("run", {"seed": 3}, 10.0)


def test_values_without_repetitions(tmp_path: Path) -> None:
    members = {f"m{i}": {"x": x} for i, x in enumerate([3, 1, True, "1", None, 3])}
    write_sweep(tmp_path, {"x": [3, 0]}, members)
    assert [repr(x) for x in collect(tmp_path).over["x"]] == ["3", "0", "1", "True", "None"]


def test_member_csv(tmp_path: Path) -> None:
    names = [f"backend={b},seed={s}" for b in ("native", "im2col") for s in (0, 1)]
    members = {n: dict(part.split("=") for part in n.split(",")) for n in names}
    write_sweep(tmp_path, {"backend": ["native", "im2col"], "seed": ["0", "1"]}, members)
    write_run(tmp_path / names[0], val=[0.7512345678901234])
    write_run(tmp_path / names[1], status="failed", error='a "quoted", thing')
    write_member_csv(collect(tmp_path), tmp_path / "sweep.csv")
    rows = list(csv.DictReader((tmp_path / "sweep.csv").read_text().splitlines()))
    assert [row["directory"] for row in rows] == names
    assert [row["status"] for row in rows] == ["completed", "failed", "pending", "pending"]
    assert float(rows[0]["val/acc"]) == 0.7512345678901234
    assert (rows[0]["backend"], rows[0]["seed"], rows[0]["seconds"]) == ("native", "0", "10.0")
    assert rows[1]["error"] == 'a "quoted", thing'
    assert rows[3]["val/acc"] == rows[3]["seconds"] == ""


def test_checksum_of_a_result(tmp_path: Path) -> None:
    write_run(tmp_path / "a")
    content = json.loads((tmp_path / "a/result.json").read_text())
    content["status"] = "failed"
    (tmp_path / "a/result.json").write_text(json.dumps(content))
    assert collect(tmp_path).members[0].status == "damaged"
    del content["sha256"]
    (tmp_path / "a/result.json").write_text(json.dumps(add_checksum(content)))
    assert collect(tmp_path).members[0].status == "failed"
