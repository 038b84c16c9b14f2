"""The command line as a user meets it: real processes, signals, a real TensorBoard server."""

import fcntl
import json
import os
import re
import signal
import struct
import subprocess
import sys
import termios
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import QUICK, TRAIN
from conftest import ROOT, Run
from tensorboard_page import Server


def test_a_run_in_a_pipe(cnntrain: Run, tmp_path: Path) -> None:
    done = cnntrain(*QUICK, "backend=im2col", "model=lenet5", "trainer.max_epochs=2")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert sum("Im2colConv2d" in line for line in lines) == 3
    number = r"[\d.,]+"
    epoch = (
        rf"epoch \d/2  train loss {number} acc +{number}%  val loss {number} acc +{number}%"
        rf"  {number} images/s  {number} s"
    )
    assert sum(re.fullmatch(epoch, line) is not None for line in lines) == 2, done.stdout
    accuracy, directory, tensorboard = lines[-3:]
    folder = directory.removeprefix("run directory").strip()
    assert re.fullmatch(r"outputs/lenet5_im2col/\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d-\d{6}", folder)
    assert tensorboard.split() == ["TensorBoard", "tensorboard", "--logdir", folder]
    result = json.loads((tmp_path / folder / "result.json").read_text())
    assert f"{result['metrics']['test/acc']:.2%}" == accuracy.split()[2]
    assert (tmp_path / folder / ".hydra/overrides.yaml").exists()
    log = (tmp_path / folder / "train.log").read_text()
    assert "epoch 2/2" in log
    assert "features.0" in log
    assert done.stderr == ""
    environment = json.loads((tmp_path / folder / "environment.json").read_text())
    assert "backend=im2col" in environment["command"]


def test_a_terminal_shows_a_bar(tmp_path: Path) -> None:
    """In a pseudo-terminal, with loss, accuracy and images/s."""
    command = [*TRAIN, "data=fashion_mnist_mini", "trainer.max_epochs=2", "data.batch_size=16"]
    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))
    with subprocess.Popen(command, cwd=tmp_path, stdout=slave, stderr=slave) as process:
        os.close(slave)
        shown = b""
        while chunk := _read(master):
            shown += chunk
    os.close(master)
    assert process.returncode == 0, shown
    assert re.search(rb"epoch 2/2 .*\| .* loss \d\.\d{4} acc \d+\.\d+% [\d,]+ images/s", shown)
    assert re.search(rb"epoch 2/2  train loss", shown)


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # Linux says so when the last process has closed its end
        return b""


def test_two_starts_at_once_have_two_directories(tmp_path: Path) -> None:
    started = [
        subprocess.Popen([*TRAIN, *QUICK], cwd=tmp_path, stdout=subprocess.DEVNULL)
        for _ in range(2)
    ]
    assert [process.wait(timeout=120) for process in started] == [0, 0]
    results = list(tmp_path.glob("outputs/*/*/result.json"))
    assert len(results) == 2
    assert all(json.loads(r.read_text())["status"] == "completed" for r in results)


def test_an_occupied_directory_is_left_as_it_is(cnntrain: Run, tmp_path: Path) -> None:
    directory = f"hydra.run.dir={tmp_path / 'my run'}"
    assert cnntrain(*QUICK, directory).returncode == 0
    before = {p: p.read_bytes() for p in (tmp_path / "my run").rglob("*") if p.is_file()}
    done = cnntrain(*QUICK, "seed=1", directory)
    assert done.returncode == 2
    assert "hydra.run.dir=" in done.stderr
    assert "holds another run already" in done.stderr
    after = {p: p.read_bytes() for p in (tmp_path / "my run").rglob("*") if p.is_file()}
    assert after == before


def test_ctrl_c_is_recorded(tmp_path: Path) -> None:
    command = [*TRAIN, "data=fashion_mnist_mini", "trainer.max_epochs=500", "hydra.run.dir=run"]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background jobs ignore SIGINT, and so would what the tests start in one.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("run/checkpoints/last.ckpt")):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in said
    assert json.loads((tmp_path / "run/result.json").read_text())["status"] == "interrupted"


def test_no_data_is_one_message(tmp_path: Path, cnntrain: Run) -> None:
    """Without cache, system folder, network and apt: what was tried, and a way out."""
    if Path("/usr/share/datasets/fashion-mnist").exists():
        pytest.skip("Debian's package dataset-fashion-mnist is installed here")
    file = tmp_path / "file"
    file.write_text("")
    done = cnntrain("trainer.max_epochs=1", f"data.root={file / 'below'}")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "data=fashion_mnist_mini" in done.stderr


def test_a_backend_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "mypkg.py").write_text(
        "from cnntrain.conv import NaiveConv2d\n\n\nclass MyConv2d(NaiveConv2d):\n    pass\n"
    )
    command = [sys.executable, "-m", "cnntrain", "train", *QUICK, "model=shallow"]
    done = subprocess.run(
        [*command, "backend._target_=mypkg.MyConv2d"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "MyConv2d" in done.stdout


def test_a_config_folder_of_ones_own(cnntrain: Run, tmp_path: Path) -> None:
    experiment = tmp_path / "my conf/experiment/tiny.yaml"
    experiment.parent.mkdir(parents=True)
    experiment.write_text("# @package _global_\nseed: 7\nmodel:\n  hidden: 11\n")
    done = cnntrain("--config-dir", "my conf", "experiment=tiny", "--cfg", "job")
    assert done.returncode == 0, done.stderr
    assert "seed: 7" in done.stdout
    assert "hidden: 11" in done.stdout
    done = cnntrain("--config-dir", "my conf", "experiment=tinny")
    assert done.returncode == 2
    assert "did you mean 'tiny'" in done.stderr


def test_tab_completion(tmp_path: Path) -> None:
    environment = {**os.environ, "COMP_LINE": "train.py backend=im", "COMP_POINT": "19"}
    done = subprocess.run(
        [*TRAIN, "-sc", "query=bash"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.stdout.split() == ["backend=im2col"]
    install = subprocess.run([*TRAIN, "-sc", "install=bash"], capture_output=True, text=True)
    assert "complete -o nospace" in install.stdout


def test_commands_are_listed_and_a_wrong_one_refused(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cnntrain"]
    listed = subprocess.run([*command, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert listed.returncode == 0
    assert "train a network from a config" in listed.stdout
    wrong = subprocess.run([*command, "trian"], cwd=ROOT, capture_output=True, text=True)
    assert wrong.returncode == 2
    assert wrong.stderr == "cnntrain: no command 'trian'; did you mean 'train'?\n"


@pytest.fixture
def server(cnntrain: Run, tmp_path: Path) -> Iterator[str]:
    """TensorBoard over one run's folder; the address."""
    assert cnntrain(*QUICK, "hydra.run.dir=outputs/first").returncode == 0
    with Server(tmp_path / "outputs") as address:
        yield address.rstrip("/")


def _ask(address: str, body: bytes | None = None) -> object:
    request = urllib.request.Request(address, data=body)
    request.add_header("Content-Type", "application/json")
    with urllib.request.urlopen(request, timeout=10) as answer:
        return json.load(answer)


def test_tensorboard_shows_the_run(server: str, tmp_path: Path) -> None:
    deadline = time.monotonic() + 60
    tags: dict = {}
    while "first" not in tags:
        assert time.monotonic() < deadline
        time.sleep(0.5)
        try:
            tags = _ask(f"{server}/data/plugin/scalars/tags")  # type: ignore[assignment]
        except OSError:
            continue
    shown = {"train/loss", "train/acc", "val/loss", "test/acc", "wall_time/images_per_second"}
    assert shown <= set(tags["first"])
    experiment = _ask(f"{server}/data/plugin/hparams/experiment", b"{}")
    names = {info["name"] for info in experiment["hparamInfos"]}  # type: ignore[index]
    assert {"optimizer.lr", "model._target_", "data.batch_size", "seed"} <= names
    columns = [{"metric": m["name"]} for m in experiment["metricInfos"]]  # type: ignore[index]
    asked = {"allowedStatuses": ["STATUS_SUCCESS"], "colParams": columns, "sliceSize": 9}
    groups = _ask(f"{server}/data/plugin/hparams/session_groups", json.dumps(asked).encode())
    (group,) = groups["sessionGroups"]  # type: ignore[index]
    assert group["hparams"]["optimizer.lr"] == 0.005
    result = json.loads((tmp_path / "outputs/first/result.json").read_text())["metrics"]
    shown = {m["name"]["tag"]: m["value"] for m in group["metricValues"]}
    assert shown == pytest.approx(result)


def test_the_folder_one_is_in_is_searched(cnntrain: Run, tmp_path: Path) -> None:
    (tmp_path / "mypkg.py").write_text("from torch import nn\n\n\nclass My(nn.Conv2d): pass\n")
    done = cnntrain(*QUICK[1:], "backend._target_=mypkg.My", "experiment=quick")
    assert done.returncode == 0, done.stderr
    assert "epoch 1/1" in done.stdout
