"""The command line as a user meets it: real processes, signals, a real TensorBoard server."""

import csv
import fcntl
import gzip
import json
import os
import re
import shlex
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, Run
from PIL import Image
from test_data_idx import idx_bytes

QUICK = ["data=fashion_mnist_mini", "trainer.max_epochs=1", "+trainer.limit_train_batches=3"]
TRAIN = [sys.executable, str(ROOT / "train.py")]


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
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    script = "from tensorboard.main import run_main; run_main()"
    options = ["--logdir", "outputs", "--port", str(port), "--host", "127.0.0.1"]
    process = subprocess.Popen(
        [sys.executable, "-c", script, *options],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    yield f"http://127.0.0.1:{port}"
    process.terminate()
    process.wait(timeout=30)


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
    assert {"train/loss", "train/acc", "val/loss", "val/acc", "test/acc", "images_per_second"} <= (
        set(tags["first"])
    )
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


def commands_of(page: str, *starts: str) -> list[str]:
    """A page's lines that start so; `pip`, `pytest` and the rest are run by .ci/run."""
    lines = (ROOT / page).read_text().splitlines()
    lines = [line.split("   #")[0].strip() for line in lines]
    commands = [c.strip() for line in lines for c in line.removeprefix("$ ").split("&&")]
    return [c for c in commands if c.startswith(starts) and "<" not in c]


def readme_commands(*starts: str) -> list[str]:
    return commands_of("README.md", *starts)


def test_the_folder_one_is_in_is_searched(cnntrain: Run, tmp_path: Path) -> None:
    (tmp_path / "mypkg.py").write_text("from torch import nn\n\n\nclass My(nn.Conv2d): pass\n")
    done = cnntrain(*QUICK[1:], "backend._target_=mypkg.My", "experiment=quick")
    assert done.returncode == 0, done.stderr
    assert "epoch 1/1" in done.stdout


@pytest.mark.parametrize("command", readme_commands("cnntrain verify", "cnntrain benchmark"))
def test_readme_command_of_the_lab(command: str, tmp_path: Path) -> None:
    """As the README has it, on few cases."""
    (tmp_path / "mypkg.py").write_text("from cnntrain.conv import NaiveConv2d as MyConv2d\n")
    arguments = shlex.split(command.split("`")[0])[1:]
    few = {"verify": ["short=true", "cases=2", "only=adjoint"], "benchmark": ["rounds=1"]}
    few["benchmark"] += ["min_turn_ms=0"] + ["batch_sizes=[2]"] * ("seed_table" not in command)
    done = subprocess.run(
        [sys.executable, "-m", "cnntrain", *arguments, *few[arguments[0]]],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert ("passes every check" if arguments[0] == "verify" else "x native") in done.stdout


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run, outputs/mine, and the pictures that the README names."""
    folder = tmp_path_factory.mktemp("desk")
    options = [*QUICK, "backend=im2col", "tensorboard=scalars", "hydra.run.dir=outputs/mine"]
    subprocess.run([*TRAIN, *options], cwd=folder, check=True, capture_output=True, timeout=300)
    (folder / "folder").mkdir()
    for name in ("photo.png", "folder/another.jpg", "scan.jpg"):
        Image.new("RGB", (90, 120), (200, 180, 160)).save(folder / name)
    idx = folder / "t10k-images-idx3-ubyte.gz"
    idx.write_bytes(gzip.compress(idx_bytes(np.zeros((3, 28, 28), np.uint8))))
    return folder


@pytest.mark.parametrize(
    "command",
    [
        *readme_commands("cnntrain evaluate", "cnntrain predict", "cnntrain export"),
        *commands_of("docs/lessons.md", "cnntrain lesson"),
    ],
)
def test_command_of_the_pages(command: str, desk: Path) -> None:
    arguments = shlex.split(command)[1:]
    few = ["rounds=1", "batch_size=2"] if arguments[:2] == ["lesson", "cost"] else []
    done = subprocess.run(
        [sys.executable, "-m", "cnntrain", *arguments, *few],
        cwd=desk,
        capture_output=True,
        text=True,
        timeout=300,
    )
    if "size=3 kernel=5" in command:  # as the page has it
        assert done.returncode == 2
        shown = (ROOT / "docs/lessons.md").read_text()
        assert all(line in shown for line in done.stderr.splitlines()), done.stderr
        return
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    last = done.stdout.splitlines()[-1]
    file = desk / re.sub(r"   \(.* bytes\)$", "", last)
    assert last.startswith("{") or file.stat().st_size > 0


def test_what_a_lesson_shows_is_in_its_page(desk: Path) -> None:
    page = (ROOT / "docs/lessons.md").read_text()
    for lesson in (["window", "padding=1", "stride=2"], ["patterns"]):
        command = [sys.executable, "-m", "cnntrain", "lesson", *lesson]
        done = subprocess.run(command, cwd=desk, capture_output=True, text=True, timeout=300)
        lines = [line.rstrip() for line in done.stdout.splitlines()[:-2]]
        text = "\n".join(lines if lesson[0] == "window" else lines[-3:])
        assert text.strip() in page


# The ablation is tested with the lessons.
LESSONS = [c for c in commands_of("docs/lessons.md", "python train.py") if "ablation" not in c]


@pytest.mark.parametrize("command", [*readme_commands("python train.py "), *LESSONS])
def test_readme_command(command: str, cnntrain: Run, tmp_path: Path) -> None:
    """As the README has it, on little data."""
    (tmp_path / "mypkg.py").write_text("from cnntrain.conv import NaiveConv2d as MyConv2d\n")
    arguments = shlex.split(command.split("`")[0])[2:]
    if not any(a.startswith(("data=", "experiment=")) for a in arguments):
        arguments.append("data=fashion_mnist_mini")
    few = ["search.trials=2"] if "search=" in command else []
    done = cnntrain(*arguments, *QUICK[1:], *few, PYTHONPATH=str(tmp_path))
    if "trainer=gpu" in arguments and not Path("/dev/nvidia0").exists():
        assert done.returncode == 2
        assert "this machine has no GPU that PyTorch can use" in done.stderr
    elif "im2coll" in command:
        assert done.returncode == 2
        shown = (ROOT / "README.md").read_text()
        assert all(line in shown for line in done.stderr.splitlines()), done.stderr
    elif "optimizer.lr=1e20" in command:
        assert done.returncode == 3
        assert "is nan; the first layer with a non-finite output is features.6" in done.stderr
    else:
        assert done.returncode == 0, done.stderr
        last = done.stdout.splitlines()[-1]
        assert "--cfg" in command or "test accuracy" in done.stdout or " -m " in command
        assert " -m " not in command or re.fullmatch(r"\d+ (completed|ended)", last), last


def test_benchmark_writes_its_ratios(tmp_path: Path) -> None:
    """The README's measurement, one round on little data; what it measures is not tested."""
    command = [sys.executable, str(ROOT / "scripts/benchmark_training.py"), "--rounds", "1"]
    options = ["--batch-sizes", "512", "--data", "fashion_mnist_mini", "--csv", "ratios.csv"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([*command, *options], cwd=tmp_path, env=environment, check=True, timeout=300)
    rows = list(csv.DictReader((tmp_path / "ratios.csv").open()))
    speed = {row["contender"]: float(row["images_per_second"]) for row in rows}
    assert set(speed) == {"native", "im2col", "naive", "bare", "usual"}
    for row in rows:
        ratio = speed[row["contender"]] / speed["bare"]
        assert float(row["to_bare"]) == pytest.approx(ratio, abs=2e-3, rel=2e-3)


def test_readme_python() -> None:
    blocks = (ROOT / "README.md").read_text().split("```python\n")[1:]
    assert blocks
    for block in blocks:
        exec(compile(block.split("```")[0], "README.md", "exec"), {})
