"""What a sweep's members are called, how its folder is gone on with, and what is refused."""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, Run
from omegaconf import DictConfig, OmegaConf

from cnntrain.config import ConfigError, compose_all
from cnntrain.sweeps.folder import SweepFolder
from cnntrain.sweeps.members import directory_name, name, planned

FIXED = ["data=fashion_mnist_mini", "trainer=cpu"]


def composed(*overrides: str) -> DictConfig:
    return compose_all([*FIXED, *overrides], name="train")


@pytest.mark.parametrize(
    ("values", "called"),
    [
        ({"seed": 0, "backend": "im2col"}, "backend=im2col,seed=0"),
        ({"backend": "im2col", "seed": 0}, "backend=im2col,seed=0"),
        ({"model.channels": [6, 16, 128]}, "model.channels=[6,16,128]"),
        ({"model.norm": True, "x": None}, "model.norm=true,x=null"),
        ({"optimizer.lr": 1e-3}, "optimizer.lr=0.001"),
        ({}, ""),
    ],
)
def test_a_name_is_what_varies(values: dict, called: str) -> None:
    assert name(values) == called


@pytest.mark.parametrize("odd", ["a/b", "a b", "x" * 300, "é", "$HOME", "a\nb", "..", "'"])
def test_odd_values_have_a_hash(odd: str) -> None:
    called, other = name({"x": odd}), name({"x": odd + "!"})
    assert called != other
    assert len(called.encode()) <= 120
    assert "/" not in called
    assert called not in ("", ".", "..")
    assert called.isprintable()
    if odd != "..":
        assert called.startswith("x=")
        assert called != f"x={odd}"


def test_long_names_that_begin_alike_are_apart() -> None:
    a, b = (directory_name("model.channels=" + "1," * 100 + last) for last in "12")
    assert a != b
    assert a[:100] == b[:100]


def test_members_that_are_the_same_run_are_one() -> None:
    cfgs = [composed("seed=1"), composed("optimizer.lr=0.005", "seed=1"), composed("seed=2")]
    members = planned(cfgs, ["seed"])  # 0.005 is the default
    assert [m.name for m in members] == ["seed=1", "seed=2"]
    where = [composed(f"trainer.checkpoint_every_n_steps={n}") for n in (5, 7)]
    assert len(planned(where, ["trainer.checkpoint_every_n_steps"])) == 2  # asked for, both


def extended(folder: Path, varied: list[str], *runs: list[str]) -> list[str]:
    """The members' names once the folder has taken these runs in."""
    sheet = SweepFolder(folder)
    cfgs = [composed(*overrides) for overrides in runs]
    keys = [*dict.fromkeys([*sheet.sheet["over"], *varied])]
    members = sheet.extend(cfgs, planned(cfgs, keys), keys)
    sheet.write(metric="val/acc", mode="max")
    return [member.name for member in members]


def test_a_sweep_is_extended(tmp_path: Path) -> None:
    def over() -> dict:
        return OmegaConf.to_container(OmegaConf.load(tmp_path / "sweep.yaml"))["over"]  # type: ignore

    first = extended(tmp_path, ["seed"], ["seed=0"], ["seed=1"])
    assert first == ["seed=0", "seed=1"]
    assert extended(tmp_path, ["seed"], ["seed=2"], ["seed=1"]) == ["seed=2", "seed=1"]
    assert over() == {"seed": [0, 1, 2]}
    # Another axis: those with its value of before keep their directories.
    runs = [[f"backend={b}", "seed=0"] for b in ("native", "im2col")]
    assert extended(tmp_path, ["backend", "seed"], *runs) == ["seed=0", "backend=im2col,seed=0"]
    sheet = SweepFolder(tmp_path).sheet
    assert sheet["over"] == {"seed": [0, 1, 2], "backend": ["native", "im2col"]}
    assert sheet["members"]["seed=2"]["values"] == {"seed": 2, "backend": "native"}
    # An option that varied and now does not.
    assert extended(tmp_path, [], ["seed=7"]) == ["backend=native,seed=7"]


def test_another_base_is_refused(tmp_path: Path) -> None:
    extended(tmp_path, ["backend"], ["backend=native"], ["backend=im2col"])
    before = (tmp_path / "sweep.yaml").read_bytes()
    with pytest.raises(ConfigError) as caught:
        extended(tmp_path, ["backend"], ["backend=naive", "trainer.max_epochs=3", "seed=1"])
    first, second = caught.value.problems
    assert first.startswith("seed=1: the sweep ")
    assert "was begun with 0; take another name for this one (sweep=<name>)" in first
    assert second.startswith("trainer.max_epochs=3: the sweep ")
    assert "was begun with 10;" in second
    # What comes with a choice that varies is no part of the base, but of the member.
    with pytest.raises(ConfigError) as caught:
        extended(tmp_path, ["backend"], ["backend=im2col", "+backend.max_column_mib=2"])
    assert caught.value.problems[0].startswith("backend=im2col: was begun with another config")
    assert (tmp_path / "sweep.yaml").read_bytes() == before


def test_a_damaged_sheet_is_named(tmp_path: Path) -> None:
    extended(tmp_path, ["seed"], ["seed=0"])
    for text in ("", "][", "name: x\n", "a" * 10):
        (tmp_path / "sweep.yaml").write_text(text)
        with pytest.raises(ConfigError, match=r"sweep\.yaml: is damaged; .*take another name"):
            SweepFolder(tmp_path)


MISTAKES = [
    (["sweep=x"], "sweep.name=x: is an option of a sweep; add -m"),
    (["search=lenet5_lr"], "search=lenet5_lr: is an option of a sweep; add -m"),
    (["-m", "sweep=a/b"], "sweep.name=a/b: must be a folder's name"),
    (["-m", "sweep=.."], "sweep.name=..: must be a folder's name"),
    (["-m", "sweep.metric=val/auc"], "sweep.metric=val/auc: input should be 'val/acc'"),
    (["-m", "sweep.fail_fast=maybe"], "sweep.fail_fast=maybe: input should be a valid boolean"),
    (["-m", "sweep.threads=0"], "sweep.threads=0: input should be greater than 0"),
    (["-m", "sweep=a,b"], "sweep.name: there is one for all members; give it one value"),
    (["-m", "sweep.nmae=x"], "did you mean 'name'?"),
    (["-m", "search=lenet5"], "did you mean 'lenet5_lr'?"),
    (["-m", "search=lenet5_lr", "seed=0,1"], "seed: has several values; a search varies"),
    (["-m", "search=lenet5_lr", "optimizer.lr=0.1"], "optimizer.lr=0.1: is searched over"),
    (["-m", "search=lenet5_lr", "sweep.metric=test/acc"], "has no test left; take val/acc"),
    (["-m", "seed=0,1", "hydra/launcher=joblb"], "hydra/launcher=joblb: "),
    (["-m", "hydra.sweep.dir=/proc/x"], "hydra.sweep.dir=/proc/x: "),
    (["-m", "resume=x"], "resume=x: continues one run; leave out -m"),
]


@pytest.mark.parametrize(("arguments", "said"), MISTAKES, ids=[m[1][:40] for m in MISTAKES])
def test_a_mistake_is_one_line(
    arguments: list[str], said: str, cnntrain: Run, tmp_path: Path
) -> None:
    done = cnntrain("data=fashion_mnist_mini", *arguments)
    assert done.returncode == 2, done.stdout
    head, line = done.stderr.splitlines()
    assert head == "cnntrain: this cannot be run as asked"
    assert said in line
    assert list(tmp_path.iterdir()) == []


def test_mistakes_do_not_wait_for_torch() -> None:
    code = "import sys, cnntrain.commands.train; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "False\n"
