"""Invalid command lines and damaged files: one-line errors, and nothing is written."""

import itertools
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import TRAIN
from conftest import ROOT, Reject
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from run_folders import tree
from sweeps_of_records import run

from cnntrain.commands.app import command_line, restart
from cnntrain.config import CONF, ConfigError
from cnntrain.config import compose as checked
from cnntrain.sweeps.members import SweepFolder
from cnntrain.sweeps.search import Space
from cnntrain.sweeps.study import STUDY, open_storage
from cnntrain.training import dry_run
from cnntrain.training.run_directory import RunDirectory

TINY = [
    "data=fashion_mnist_mini",
    "model=shallow",
    "trainer=cpu",
    "trainer.max_epochs=1",
    "+trainer.limit_train_batches=1",
]
RECORD = {
    "name": "s",
    "over": {"seed": [0]},
    "base": {
        "options": {"optimizer.lr": 0.1},
        "choices": {"backend": "native"},
        "typed": [],
    },
    "members": {"seed=0": {"values": {"seed": 0}, "identity": "a"}},
}


def sweep(folder: Path, content: object) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "sweep.json").write_text(json.dumps(content))
    return folder


MISTAKES = [
    (["sweep=x"], "sweep.name=x: is an option of a sweep; add -m"),
    (["search=lenet5_lr"], "search=lenet5_lr: is an option of a sweep; add -m"),
    (["-m", "sweep=a/b"], "sweep.name=a/b: must be a folder's name"),
    (["-m", "sweep=.."], "sweep.name=..: must be a folder's name"),
    (["-m", "sweep.metric=val/auc"], "sweep.metric=val/auc: input should be 'val/acc'"),
    (["-m", "sweep.fail_fast=maybe"], "sweep.fail_fast=maybe: input should be a valid boolean"),
    (["-m", "sweep.threads=0"], "sweep.threads=0: input should be greater than 0"),
    (["-m", "sweep=a,b"], "sweep.name: is the same for all members; give it one value"),
    (["-m", "sweep.nmae=x"], "did you mean 'name'?"),
    (["-m", "search=lenet5"], "did you mean 'lenet5_lr'?"),
    (["-m", "search=lenet5_lr", "seed=0,1"], "seed: has several values; a search varies"),
    (["-m", "search=lenet5_lr", "optimizer.lr=0.1"], "optimizer.lr=0.1: is searched over"),
    (
        ["-m", "search=lenet5_lr", "sweep.metric=test/acc"],
        "search.metric=test/acc: input should be 'val/acc', 'val/loss'",
    ),
    (["-m", "seed=0,1", "hydra/launcher=joblb"], "hydra/launcher=joblb: "),
    (["-m", "hydra.sweep.dir=/proc/x"], "hydra.sweep.dir=/proc/x: "),
    (["-m", "resume=x"], "resume=x: continues one run; leave out -m"),
    (["-m", "sweep="], "sweep.name=: must be a folder's name"),
    (["-m", "~sweep", "hydra.sweep.dir=x"], "~sweep: has the options of the sweep; leave it in"),
    (["-m", "hydra/launcher=basic,joblib"], "hydra/launcher: is the same for all members"),
]


@pytest.mark.parametrize(("typed", "error"), MISTAKES, ids=[m[1][:40] for m in MISTAKES])
def test_rejected_with_nothing_written(
    reject: Reject, monkeypatch: pytest.MonkeyPatch, typed: list[str], error: str
) -> None:
    monkeypatch.setattr("cnntrain.sweeps.processes.start_server", lambda: None)
    (line,) = reject("data=fashion_mnist_mini", *typed)
    assert error in line


def test_torch_is_not_imported_for_the_check() -> None:
    code = "import sys, cnntrain.commands.train; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize(("launcher", "package"), [("submitit_slurm", "submitit")])
def test_a_launcher_that_is_not_installed(tmp_path: Path, launcher: str, package: str) -> None:
    hidden = tmp_path / "shadow/hydra_plugins/__init__.py"  # found before the one with plugins
    hidden.parent.mkdir(parents=True)
    hidden.touch()
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "shadow")}
    command = [*TRAIN, "-m", *TINY, "seed=0,1", f"hydra/launcher={launcher}"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[1:] == [
        f"  hydra/launcher={launcher}: is not installed; pip install hydra-{package}-launcher"
    ]
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize(
    "wrong",
    [
        {"members": None},
        {"members": {"seed=0": {"values": {}}}},
        {"base": {"options": {}}},
        {"over": {"seed": 0}},
        "",
        '{"name": "s", "members": [',
    ],
)
def test_damaged_record(tmp_path: Path, wrong: dict[str, object] | str) -> None:
    assert [*SweepFolder(sweep(tmp_path, RECORD)).record.members] == ["seed=0"]
    if isinstance(wrong, str):
        (tmp_path / "sweep.json").write_text(wrong)
    else:
        sweep(tmp_path, {**RECORD, **wrong})
    with pytest.raises(ConfigError, match=r"sweep\.json: is damaged; move it away"):
        SweepFolder(tmp_path)


def test_record_is_restored_from_the_members(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    run(folder, "seed=0,1")
    before = (folder / "sweep.csv").read_bytes()
    (folder / "sweep.json").unlink()
    assert run(folder, "seed=0,1")[1].launched == []
    assert (folder / "sweep.csv").read_bytes() == before


def test_name_of_a_moved_sweep(tmp_path: Path) -> None:
    moved = Path(shutil.move(sweep(tmp_path / "s", RECORD), tmp_path / "moved"))
    assert SweepFolder(moved).record.name == "moved"


def test_searches_and_other_sweeps_share_no_folder(tmp_path: Path) -> None:
    grid, search = (
        sweep(tmp_path / "s", RECORD),
        sweep(tmp_path / "t", RECORD | {"search": {"a": 1}}),
    )
    assert SweepFolder(search, search=True).path == search
    with pytest.raises(ConfigError, match="holds a sweep that is no search; set another name"):
        SweepFolder(grid, search=True)
    with pytest.raises(ConfigError, match="holds trials of a search; set another name"):
        SweepFolder(search)


@pytest.mark.parametrize("lines", ["garbage\n", '{"op_code": 0, "worker_id": "a"', "1\ngarbage\n"])
def test_damaged_study(tmp_path: Path, lines: str) -> None:
    (tmp_path / STUDY).write_text(lines)
    if lines.endswith("\n"):
        with pytest.raises(ConfigError, match=rf"{STUDY}: is damaged .*sweep=<name>"):
            open_storage(tmp_path)
    else:  # incomplete after a kill: removed when the next line is written
        assert open_storage(tmp_path).get_all_studies() == []


@pytest.mark.parametrize("name", [path.stem for path in sorted((CONF / "search").glob("*.yaml"))])
def test_a_shipped_space_trains_at_its_corners(name: str) -> None:
    """An optimizer can reject a value that its signature accepts: momentum 0 with Nesterov's."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        node = compose("train", [f"search={name}"]).search
    space = Space(OmegaConf.to_container(node.space, resolve=True))
    for dimension in space.dimensions:
        for corner in dimension.corners:
            for values in itertools.product(*dimension.when.values()):
                made = {**dict(zip(dimension.when, values, strict=True)), dimension.option: corner}
                dry_run(
                    checked(["data=fashion_mnist_mini", *(f"{o}={v}" for o, v in made.items())])
                )


@pytest.mark.parametrize("name", ["train", "verify"])
@pytest.mark.parametrize(
    "file",
    [
        "model/shallow",
        "experiment/lenet5",
        "search/lenet5_lr",
        "search/sampler/tpe",
        "train",
        "hydra/help/verify",
    ],
)
def test_own_file_with_a_shipped_name(tmp_path: Path, file: str, name: str) -> None:
    path = tmp_path / f"{file}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("lr: 3\n")
    (tmp_path / "mine.yaml").touch()
    with pytest.raises(ConfigError) as error:
        checked([], name=name, extra=tmp_path)
    assert len(error.value.problems) == 1
    assert error.value.problems[0].startswith(f"{path}: is ignored, as ")
    with pytest.raises(ConfigError, match=f"{file}.yaml: is ignored"):
        checked([f"hydra.searchpath=[file://{tmp_path}]"], name=name)
    path.rename(path.with_name("other.yaml"))
    checked([], name=name, extra=tmp_path)


def test_copy_of_shipped_files(tmp_path: Path) -> None:
    shutil.copytree(CONF, tmp_path / "conf")
    checked(["data=fashion_mnist_mini"], extra=tmp_path / "conf")


@pytest.mark.parametrize("record", ["result.json", "checkpoints"])
def test_a_directory_that_is_rejected_is_left_alone(tmp_path: Path, record: str) -> None:
    (tmp_path / record).mkdir()
    with pytest.raises(ConfigError, match="holds another run already"):
        RunDirectory(tmp_path)
    assert tree(tmp_path) == {record: None}


@pytest.mark.parametrize(
    "command",
    [
        ["python", "train.py"],
        ["/usr/bin/python3", "-X", "utf8", "-m", "cnntrain", "train"],
        ["cnntrain", "train"],
    ],
)
def test_printed_command_is_the_one_typed(
    command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    script = shutil.which("cnntrain")
    started = ["python", script, "train"] if command[0] == "cnntrain" and script else command
    where = ["--config-dir", "my conf", "-cn", "mine"]
    typed = ["-m", *where, "search=lr", "data.root='a b'"]
    monkeypatch.setattr(sys, "orig_argv", [*started, *typed])
    monkeypatch.setattr(sys, "argv", ["cnntrain train", *typed])
    printed = restart(command_line(), ["data.root='a b'", "optimizer.lr=0.1"])
    options = ["--config-dir=my conf", "--config-name=mine"]
    assert shlex.split(printed) == [*command, *options, "data.root='a b'", "optimizer.lr=0.1"]
