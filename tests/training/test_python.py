"""Runs and finished runs used from Python: a script, a notebook, an application with logging."""

import base64
import csv
import io
import logging
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from conftest import ROOT
from finished_runs import plain_network
from forked import run_command
from PIL import Image
from rich.console import Console
from rich.logging import RichHandler

import cnntrain
from cnntrain.config import ConfigError, compose
from cnntrain.data import FashionMNISTMini
from cnntrain.inference import evaluate, export, load_trained, predict
from cnntrain.interruption import SIGNALS, interruption
from cnntrain.lab.lessons import activations
from cnntrain.sweeps.records import collect
from cnntrain.sweeps.report import write_report
from cnntrain.training import Result, train

FEW = [
    "data=fashion_mnist_mini",
    "data.val_size=4400",
    "model=shallow",
    "tensorboard=scalars",
    "trainer=cpu",
    "trainer.max_epochs=2",
    "trainer.progress_bar=false",
]


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Result:
    return train(compose(FEW), tmp_path_factory.mktemp("python") / "run")


@pytest.fixture
def logger() -> logging.Logger:
    """The root logger, whose handlers and level are put back."""
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    yield root
    root.handlers[:] = before
    root.setLevel(level)


def counts(text: str) -> list[int]:
    """How often the table, each of two epochs and the accuracy are in a text."""
    lines = ("MACs / image", "epoch 1/2  train", "epoch 2/2  train", "test accuracy")
    return [text.count(line) for line in lines]


def assert_nothing_is_left() -> None:
    ours = logging.getLogger("cnntrain")
    assert (ours.handlers, ours.level, ours.propagate) == ([], logging.NOTSET, True)


SCRIPT = """
import sys
from cnntrain import compose, train
few = sys.argv[1:]
train(compose([*few, "trainer.max_epochs=2"]), "outputs/mine")
print("between", flush=True)
train(compose([*few, "trainer.max_epochs=2000"]), "outputs/long")
print("not reached")
"""


def test_script(tmp_path: Path) -> None:
    """The lines and the run directory are those of the command line; Ctrl-C ends in one line."""
    (tmp_path / "script.py").write_text(SCRIPT)
    process = subprocess.Popen(
        [sys.executable, "script.py", *FEW],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "FORCE_COLOR": "1"},  # as in a notebook
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    lines = iter(process.stdout)
    shown = "".join(iter(lambda: next(lines), "between\n"))
    while "epoch    2/2000" not in next(lines):
        pass
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=100)
    assert process.returncode == 130
    assert "not reached" not in out
    assert err.strip().splitlines() == [
        "cnntrain: SIGINT: saving a checkpoint; interrupt again to stop at once",
        "cnntrain: interrupted by SIGINT; resume with train(cfg, 'outputs/long', resume=True)",
    ]
    assert counts(shown) == [1, 1, 1, 1]

    done = run_command(["train", *FEW, "hydra.run.dir=outputs/command"], tmp_path)

    def comparable(text: str) -> str:
        text = re.sub(r"[\d,]+ images/s  [\d.]+ s$|\d+ s in all", "", text, flags=re.MULTILINE)
        return text.replace("outputs/command", "outputs/mine").strip()

    assert comparable(shown) == comparable(done.stdout)
    files = [
        {str(f.relative_to(run)) for f in run.rglob("*") if "tfevents" not in f.name}
        for run in (tmp_path / "outputs/mine", tmp_path / "outputs/command")
    ]
    assert files[0] == files[1]
    assert {"train.log", ".hydra/overrides.yaml", "environment.json"} <= files[0]
    text = (tmp_path / "outputs/mine/train.log").read_text(encoding="utf-8")
    assert counts(text) == [1, 1, 1, 1]


def test_train_in_a_thread_prints_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, options in (("a", FEW), ("b", [*FEW, "profile=true"])):
        thread = threading.Thread(target=train, args=(compose(options), str(tmp_path / name)))
        thread.start()
        thread.join(100)
        assert counts(capsys.readouterr().out) == [1, 1, 1, 1]
        assert counts((tmp_path / name / "train.log").read_text(encoding="utf-8")) == [1, 1, 1, 1]
        assert_nothing_is_left()
    assert (tmp_path / "b/profile/trace.json").exists()


def test_two_runs_at_a_time_are_rejected(tmp_path: Path) -> None:
    class Nested(cnntrain.training.Profile):
        def on_train_batch_start(self, *_: object) -> None:
            train(compose(FEW), tmp_path / "inner")

    with pytest.raises(ConfigError, match=r"^directory=.*inner: another run is training in this"):
        train(compose(FEW), tmp_path / "outer", callbacks=[Nested(tmp_path)])
    assert not (tmp_path / "inner").exists()
    assert_nothing_is_left()


@pytest.mark.parametrize("name", ["", "cnntrain"])
@pytest.mark.parametrize("how", ["stdout", "rich", "file"])
def test_lines_with_logging_configured(
    how: str,
    name: str,
    result: Result,
    tmp_path: Path,
    logger: logging.Logger,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each is shown once, wherever the caller's handler is."""
    handler: logging.Handler = logging.StreamHandler(sys.stdout)
    if how == "rich":
        handler = RichHandler(console=Console(width=300))
    elif how == "file":
        handler = logging.FileHandler(tmp_path / "application.log", encoding="utf-8")
    logger.setLevel(logging.WARNING)
    logging.getLogger(name).addHandler(handler)
    try:
        again = train(compose(FEW), result.directory, resume=True)
        logging.getLogger("cnntrain.training").warning("a warning")
    finally:
        logging.getLogger(name).removeHandler(handler)
    shown = capsys.readouterr().out
    assert (shown.count("already completed"), shown.count("test accuracy")) == (1, 1)
    assert shown.count("a warning") == (how != "file")
    assert again == result
    assert_nothing_is_left()


def test_level_of_the_caller_is_kept(result: Result, capsys: pytest.CaptureFixture[str]) -> None:
    logging.getLogger("cnntrain").setLevel(logging.WARNING)
    try:
        train(compose(FEW), result.directory, resume=True)
    finally:
        logging.getLogger("cnntrain").setLevel(logging.NOTSET)
    assert capsys.readouterr().out == ""


@pytest.fixture
def not_a_command() -> None:
    """Signals as in a process that has run no command; one that has keeps handling them."""
    interruption.uninstall()
    for signum in SIGNALS:
        default = signal.default_int_handler if signum == signal.SIGINT else signal.SIG_DFL
        signal.signal(signum, default)


@pytest.mark.parametrize("interactive", [True, False])
def test_interrupted_call(
    interactive: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, not_a_command: None
) -> None:
    """SIGINT before training: nothing to save. IPython asks for the lines of an exception."""
    monkeypatch.delattr(sys, "ps1", raising=False)
    if interactive:
        monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)

    class Press(cnntrain.training.Profile):
        presses = 1

        def on_train_batch_start(self, *_: object) -> None:
            for _ in range(self.presses):
                os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    for Press.presses in (1, 2):  # the second does not end the process, which is the caller's
        with pytest.raises(KeyboardInterrupt) as caught:
            train(compose(FEW), tmp_path / "it's", resume=True, callbacks=[Press(tmp_path)])
        line = f'resume with train(cfg, "{tmp_path}/it\'s", resume=True)'
        assert str(caught.value) == f"interrupted by SIGINT; {line}"
        assert caught.value._render_traceback_() == [
            f"{type(caught.value).__name__}: interrupted by SIGINT; {line}"
        ]
        assert isinstance(caught.value, SystemExit) != interactive
        assert caught.value.exit_code == 130
        assert caught.value.__suppress_context__
    assert signal.getsignal(signal.SIGINT) == before
    assert_nothing_is_left()


def test_messages_name_arguments(result: Result, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    wrong = [
        (result.directory, FEW, "holds another run already; .*resume=True"),
        ("", FEW, "must name a folder"),
        ("~/run", FEW, "~ is not expanded; write directory="),
        (tmp_path / "file" / "run", FEW, "is not a writable folder"),
        (tmp_path / "new", [*FEW, "resume=outputs/x"], "resume=True"),
        (tmp_path / "new", [*FEW, "search=lenet5_lr"], "of the command line"),
    ]
    for directory, options, message in wrong:
        with pytest.raises(ConfigError, match=message) as caught:
            train(compose(options), directory)
        assert "hydra" not in str(caught.value)
        assert caught.value._render_traceback_() == [f"ConfigError: {caught.value}"]
    with pytest.raises(ConfigError, match=r"^cfg: is list; pass what compose\(\[...\]\) returns"):
        train(FEW, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert not Path("~").exists()


def test_result(result: Result, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The model is the one that was tested; history holds metrics.csv; figures without pyplot."""
    plain = plain_network(result.directory, "best", *FEW)
    images = torch.randn(7, 1, 28, 28)
    with torch.no_grad():
        assert torch.equal(result.model(images), plain(images))
        again = train(compose(FEW), result.directory, resume=True)
        assert torch.equal(again.model(images), plain(images))
    assert not result.model.training
    rows = list(csv.DictReader((result.directory / "metrics.csv").open()))
    assert len(result.history["epoch"]) == len(rows) == 2
    for name in ("epoch", "step", "train/loss", "val/acc", "lr"):
        assert result.history[name].tolist() == [float(row[name]) for row in rows]
    assert result.history["epoch"].dtype.kind == "i"
    assert len(repr(result).splitlines()) == 1
    assert len(repr(result)) < 300
    assert str(result.directory) in repr(result)
    figure = result.plot()
    assert isinstance(figure, matplotlib.figure.Figure)
    curve = figure.axes[0].lines[0].get_ydata()
    assert list(curve) == result.history["train/loss"].tolist()
    assert Image.open(io.BytesIO(figure._repr_png_())).format == "PNG"
    assert pictures_in(result._repr_html_()) == 1


def pictures_in(html: str) -> int:
    """How many images a page has, all of them whole."""
    found = re.findall(r'<img src="data:image/png;base64,([^"]+)"', html)
    for text in found:
        Image.open(io.BytesIO(base64.b64decode(text))).load()
    return len(found)


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return FashionMNISTMini().read("test")[0][:6]  # uint8 (6, 1, 28, 28)


# How the six images, or the first of them, can be given.
SIX = {
    "array (N, C, H, W)": lambda x: x,
    "int64": lambda x: x.astype(np.int64),
    "float64": lambda x: x / 255,
    "float32": lambda x: (x / 255).astype(np.float32),
    "tensor (N, C, H, W)": torch.from_numpy,
    "tensor (N, 3, H, W)": lambda x: torch.from_numpy(x).expand(-1, 3, -1, -1),
    "float16 tensor": lambda x: torch.from_numpy(x / 255).half(),
    "tensor with gradient": lambda x: torch.from_numpy(x / 255).requires_grad_(),
    "list of PIL images": lambda x: [Image.fromarray(one[0]) for one in x],
    "generator": lambda x: (torch.from_numpy(one) for one in x),
    "mixed": lambda x: [x[0, 0], Image.fromarray(x[1, 0]), torch.from_numpy(x[2]), x[3:]],
}
ONE = {
    "array (H, W)": lambda x: x[0, 0],
    "array (H, W, 1)": lambda x: x[0, 0, :, :, None],
    "array (H, W, 3)": lambda x: np.repeat(x[0, 0, :, :, None], 3, axis=2),
    "array (H, W, 4)": lambda x: np.dstack([x[0, 0]] * 3 + [np.full_like(x[0, 0], 255)]),
    "array (1, H, W)": lambda x: x[0],
    "tensor (H, W)": lambda x: torch.from_numpy(x[0, 0]),
    "tensor (C, H, W)": lambda x: torch.from_numpy(x[0]),
    "tensor (3, H, W)": lambda x: torch.from_numpy(x[0]).expand(3, -1, -1),
    "PIL image": lambda x: Image.fromarray(x[0, 0]),
}


def test_predict_takes_arrays(result: Result, pixels: np.ndarray, tmp_path: Path) -> None:
    network, data = plain_network(result.directory, "best", *FEW), FashionMNISTMini()
    with torch.no_grad():
        shares = network(data.normalised(torch.from_numpy(pixels))).softmax(1)
    wanted = shares.max(1)
    Image.fromarray(pixels[0, 0]).save(tmp_path / "a.png")
    ways = {**SIX, **ONE, "path": lambda x: tmp_path / "a.png", "text": lambda x: f"{tmp_path}"}
    for way, make in ways.items():
        found = predict(result, make(pixels))
        assert len(found) == (6 if way in SIX else 1), way
        for i, one in enumerate(found):
            assert one.error is None, way
            assert one.classes[0][0] == data.classes[wanted.indices[i]], way
            assert one.classes[0][1] == pytest.approx(float(wanted.values[i]), abs=2e-3), way
            assert (one.pixels == pixels[i]).all() or "float16" in way, way
    assert [one.name for one in predict(result, pixels[:2])] == ["images[0]", "images[1]"]
    twice = predict(result, [str(tmp_path / "a.png")] * 2, backend="im2col")
    assert len(twice) == 2  # one for each that was given


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda x: x[:3, 0],
            r"array of uint8, shape \(3, 28, 28\): .* one image is \(H, W\) or \(H, W, C\)",
        ),
        (lambda x: x[None], "one image is "),
        (lambda x: x[:0], "shape \\(0, 1, 28, 28\\): give"),
        (
            lambda x: x.astype(np.float32),
            "of float32, .*: give .* or floats from 0 to 1",
        ),
        (lambda x: np.full((28, 28), np.nan), "floats from 0 to 1"),
        (lambda x: torch.randn(28, 28), "floats from 0 to 1"),
        (lambda x: x.astype(np.int16) - 1, "of int16, .*: give integers from 0 to 255"),
        (lambda x: np.zeros((28, 28), complex), "complex128"),
        (lambda x: [x[0], None], r"images\[1\]: is NoneType; give a path, "),
        (lambda x: 5, "images: is int; give a path, "),
        (lambda x: [], "name a file or a folder"),
        (lambda x: [Path("no.png"), x[0]], "images=no.png: there is no such file"),
    ],
)
def test_predict_rejects(make, message: str, result: Result, pixels: np.ndarray) -> None:
    with pytest.raises(ConfigError, match=message):
        predict(result, make(pixels))


def test_what_a_notebook_shows(result: Result, pixels: np.ndarray) -> None:
    found = predict(result, [pixels[0], pixels])
    assert pictures_in(found._repr_html_()) == len(found) == 7
    assert pictures_in(found[0]._repr_html_()) == 1
    assert repr(found[0]).startswith(f"Prediction('images[0]': {found[0].classes[0][0]} ")
    assert len(repr(found[0])) < 120
    evaluation = evaluate(result)
    assert len(repr(evaluation).splitlines()) <= 3
    assert f"accuracy {result.metrics['test/acc']:.2%}" in repr(evaluation)
    assert pictures_in(evaluation._repr_html_()) == 1
    assert "<td>Trouser</td><td>100</td>" in evaluation._repr_html_()
    lesson = activations()
    assert lesson.text.split("\n")[0] in lesson._repr_html_()
    assert pictures_in(lesson._repr_html_()) == 1
    assert repr(lesson) == lesson.text


def test_paths_as_text(result: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = str(result.directory)
    best = f"{run}/checkpoints/best.ckpt"
    assert load_trained(run, best).epoch == load_trained(result, Path(best)).epoch
    assert export(run, "torch", folder="export").file == Path("export/best.pt2")
    assert evaluate(run, split="val").write("evaluation")[0].exists()
    assert len(write_report(collect(str(result.directory.parent)), "report")) == 3
    activations().write("lesson/picture.png")
    assert Path("lesson/picture.png").exists()
    assert compose("seed=3", folder=str(ROOT / "conf")).seed == 3


def test_package_level_names() -> None:
    """They are there, and importing the package does not import torch or Hydra."""
    assert (cnntrain.train, cnntrain.compose, cnntrain.predict) == (train, compose, predict)
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = cnntrain.trian
    code = "import cnntrain, sys; print([m for m in ('torch', 'hydra') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "[]\n"


def test_typed() -> None:
    assert (Path(cnntrain.__file__).parent / "py.typed").exists()
