"""The command line in processes, with signals, a pseudo-terminal and a TensorBoard server."""

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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from command_line import QUICK, SCALARS, TRAIN
from conftest import ROOT, Run
from forked import run_command
from PIL import Image
from tensorboard_page import Server

Finished = tuple[subprocess.CompletedProcess[str], Path]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A run of two epochs, and the folder in which it was started."""
    folder = tmp_path_factory.mktemp("finished")
    options = [*QUICK, "backend=im2col", "model=lenet5", "trainer.max_epochs=2"]
    return run_command(["train", *options], folder), folder


def test_output_in_a_pipe(finished: Finished) -> None:
    done, here = finished
    assert (done.returncode, done.stderr) == (0, "")
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
    result = json.loads((here / folder / "result.json").read_text())
    assert f"{result['metrics']['test/acc']:.2%}" == accuracy.split()[2]
    assert (here / folder / ".hydra/overrides.yaml").exists()
    log = (here / folder / "train.log").read_text()
    assert "epoch 2/2" in log
    assert "features.0" in log
    environment = json.loads((here / folder / "environment.json").read_text())
    assert "backend=im2col" in environment["command"]


def test_directory_of_another_run_is_unchanged(finished: Finished, cnntrain: Run) -> None:
    (directory,) = finished[1].glob("outputs/*/*")
    before = {p: p.read_bytes() for p in directory.rglob("*") if p.is_file()}
    done = cnntrain(*QUICK, "seed=1", f"hydra.run.dir={directory}")
    assert done.returncode == 2
    assert f"hydra.run.dir={directory}: holds another run already" in done.stderr
    assert {p: p.read_bytes() for p in directory.rglob("*") if p.is_file()} == before


def test_progress_bar_and_ctrl_c_in_a_terminal(tmp_path: Path) -> None:
    """The bar shows loss, accuracy and images/s; SIGINT saves the run."""
    options = ["data=fashion_mnist_mini", "trainer.max_epochs=500", "hydra.run.dir=run"]
    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("4H", 24, 120, 0, 0))
    command = [*TRAIN, *options, SCALARS, "data.batch_size=32", "model=shallow"]
    bar = rb"epoch 2/500 .*\| .* loss \d\.\d{4} acc \d+\.\d+% [\d.]+ images/s"
    shown, interrupted = b"", False
    with subprocess.Popen(
        command,
        cwd=tmp_path,
        stdout=slave,
        stderr=slave,
        # A shell's background jobs ignore SIGINT, and so would the processes of a test in one.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        os.close(slave)
        while chunk := _read(master):
            shown += chunk
            if re.search(bar, shown) and not interrupted:
                process.send_signal(signal.SIGINT)
                interrupted = True
    os.close(master)
    assert interrupted
    assert process.returncode == 130, shown
    assert re.search(rb"epoch +1/500  train loss", shown)
    assert b"Traceback" not in shown
    assert json.loads((tmp_path / "run/result.json").read_text())["status"] == "interrupted"


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # on Linux, after the last process has closed its end
        return b""


def test_runs_started_at_once_have_two_directories(tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as threads:
        done = threads.map(lambda _: run_command(["train", *QUICK, SCALARS], tmp_path), range(2))
        assert [run.returncode for run in done] == [0, 0]
    results = list(tmp_path.glob("outputs/*/*/result.json"))
    assert len(results) == 2
    assert all(json.loads(r.read_text())["status"] == "completed" for r in results)


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


def test_user_backend_in_the_current_folder(cnntrain: Run, tmp_path: Path) -> None:
    (tmp_path / "mypkg.py").write_text("from torch import nn\n\n\nclass My(nn.Conv2d): pass\n")
    done = cnntrain(*QUICK[1:], SCALARS, "backend._target_=mypkg.My", "experiment=quick")
    assert done.returncode == 0, done.stderr
    assert "epoch 1/1" in done.stdout
    assert " My " in done.stdout


def test_user_config_folder(cnntrain: Run, tmp_path: Path) -> None:
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


def test_tab_completion(cnntrain: Run) -> None:
    done = cnntrain("-sc", "query=bash", COMP_LINE="train.py backend=im", COMP_POINT="19")
    assert done.stdout.split() == ["backend=im2col"]
    assert "complete -o nospace" in cnntrain("-sc", "install=bash").stdout


def test_list_of_commands_and_a_wrong_one(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cnntrain"]
    listed = subprocess.run([*command, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert listed.returncode == 0
    assert "train a network from a config" in listed.stdout
    wrong = subprocess.run([*command, "trian"], cwd=ROOT, capture_output=True, text=True)
    assert wrong.returncode == 2
    assert wrong.stderr == "cnntrain: no command 'trian'; did you mean 'train'?\n"


@pytest.fixture
def server(finished: Finished) -> Iterator[str]:
    """TensorBoard over one run's folder; the address."""
    with Server(finished[1] / "outputs") as address:
        yield address.rstrip("/")


def _ask(address: str, body: bytes | None = None) -> object:
    request = urllib.request.Request(address, data=body)
    request.add_header("Content-Type", "application/json")
    with urllib.request.urlopen(request, timeout=10) as answer:
        return json.load(answer)


def test_tensorboard_shows_the_run(server: str, finished: Finished) -> None:
    (directory,) = finished[1].glob("outputs/*/*")
    run = str(directory.relative_to(finished[1] / "outputs"))
    deadline = time.monotonic() + 60
    tags: dict = {}
    while run not in tags:
        assert time.monotonic() < deadline
        time.sleep(0.5)
        try:
            tags = _ask(f"{server}/data/plugin/scalars/tags")  # type: ignore[assignment]
        except OSError:
            continue
    shown = {"train/loss", "train/acc", "val/loss", "test/acc", "wall_time/images_per_second"}
    assert shown <= set(tags[run])
    experiment = _ask(f"{server}/data/plugin/hparams/experiment", b"{}")
    names = {info["name"] for info in experiment["hparamInfos"]}  # type: ignore[index]
    assert {"optimizer.lr", "model._target_", "data.batch_size", "seed"} <= names
    columns = [{"metric": m["name"]} for m in experiment["metricInfos"]]  # type: ignore[index]
    asked = {"allowedStatuses": ["STATUS_SUCCESS"], "colParams": columns, "sliceSize": 9}
    groups = _ask(f"{server}/data/plugin/hparams/session_groups", json.dumps(asked).encode())
    (group,) = groups["sessionGroups"]  # type: ignore[index]
    assert group["hparams"]["optimizer.lr"] == 0.005
    result = json.loads((directory / "result.json").read_text())["metrics"]
    shown = {m["name"]["tag"]: m["value"] for m in group["metricValues"]}
    assert shown == pytest.approx(result)


def test_data_inspect(tmp_path: Path) -> None:
    for number, name in enumerate(("cat", "собака")):
        for k in range(40):
            pixels = np.random.default_rng([number, k]).integers(0, 256, (8, 8, 3), dtype=np.uint8)
            (tmp_path / "photos" / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(tmp_path / f"photos/{name}/{k}.png")
    done = run_command(["data", "inspect", "data.root=photos"], tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    for name in ("cat", "собака"):
        assert re.search(rf"^{name} +32 +4 +4 +40$", done.stdout, re.M)
    assert done.stdout.endswith("\noutputs/inspect/contact_sheet.png\n")
    assert (tmp_path / "outputs/inspect/contact_sheet.png").exists()
