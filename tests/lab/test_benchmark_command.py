"""`cnntrain benchmark`: options, errors, output and files."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT
from forked import run_command
from PIL import Image

from cnntrain.commands.benchmark import _arguments
from cnntrain.config import ConfigError, compose
from cnntrain.lab.benchmark import benchmark
from cnntrain.lab.benchmark.display import number, times
from cnntrain.lab.benchmark.layers import layer_sets

WRONG = [
    (["rounds=0"], "rounds=0: input should be greater than 0"),
    (["threads=0"], "threads=0: input should be greater than 0"),
    (["batch_sizes=[0]"], "batch_sizes=[0]: input should be greater than 0"),
    (["dtypes=[float31]"], "input should be 'float32', 'float64', 'bfloat16' or 'float16'"),
    (["device=gpu"], "device=gpu: input should be 'cpu' or 'cuda'"),
    (["in_shape=[1,28]"], "in_shape=[1, 28]: has too few values"),
    (["layers=3x4"], "layers=3x4: layers has no choice '3x4'; did you mean '3x3'?"),
    (["model=lenet"], "model=lenet: model has no choice 'lenet'; did you mean 'lenet5'?"),
    (["model=lenet5", "model.drop=1"], "model.drop=1: model has no option 'drop'"),
    (["backend=im2col"], "backend=im2col: there is no option 'backend'; did you mean 'backends'?"),
    (["+directory=x"], "directory: there is no option 'directory'"),
]


@pytest.mark.parametrize(("overrides", "message"), WRONG)
def test_wrong_options_are_reported_before_anything_starts(
    overrides: list[str], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        compose(overrides, name="benchmark")
    assert message in "\n".join(caught.value.problems)


def test_presets() -> None:
    cfg = compose(["benchmark=layers"], name="benchmark")
    assert list(cfg.layers) == ["lenet5", "3x3", "stride2", "1x1", "depthwise"]
    assert list(cfg.backends) == ["native", "im2col", "unfold", "unfoldNd"]
    found = layer_sets(cfg.layers, (1, 28, 28))
    assert [s.batch_sizes for s in found] == [[64, 128, 512], *[[32, 128]] * 4]
    assert [x.shape for s in found[1:] for x in s.layers] == [
        "32->64 3x3 p1 on 16x16",
        "64->64 3x3 p1 on 32x32",
        "128->128 3x3 p1 on 8x8",
        "64->128 3x3 s2 p1 on 32x32",
        "64->256 1x1 on 16x16",
        "64->64 3x3 p1 g64 on 32x32",
    ]
    cfg = compose(["benchmark=layers", "layers=[1x1,3x3]", "rounds=3"], name="benchmark")
    assert list(cfg.layers) == ["1x1", "3x3"]


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(folder), "COLUMNS": "110"}
    return run_command(["benchmark", *arguments], folder, environment)


def test_the_command(tmp_path: Path) -> None:
    """A model, a set and a shape at once, on a class of the user's own."""
    (tmp_path / "mypkg.py").write_text("from torch import nn\n\n\nclass My(nn.Conv2d): pass\n")
    shape = "shape={in_channels: 4, out_channels: 6, kernel_size: [3, 1], stride: 2, size: [9, 8]}"
    done = run(
        tmp_path, "model=shallow", "layers=[1x1]", shape, "backends=[native,im2col,mypkg.My]",
        "batch_sizes=[2]", "threads=1", "rounds=2", "min_turn_ms=0", "hydra.run.dir=run",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    content = json.loads((tmp_path / "run/results.json").read_text())
    found = {(r["set"], r["shape"], r["backend"]) for r in content["rows"]}
    shapes = [
        ("1x1", "64->256 1x1 on 16x16"),
        ("shallow", "1->16 3x3 on 28x28"),
        ("shape", "4->6 3x1 s2 on 9x8"),
    ]
    assert found == {(*s, b) for s in shapes for b in ("native", "im2col", "My")}
    assert content["meta"]["rounds"] == 2
    with Image.open(tmp_path / "run/benchmark.png") as image:
        image.verify()
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 110
    assert "1x1, batch 2, float32" in lines
    assert any(line.startswith("1->16 3x3 on 28x28") for line in lines)
    assert lines[-3:] == ["run/results.csv", "run/results.json", "run/benchmark.png"]
    again = run(tmp_path, "layers=1x1", "hydra.run.dir=run")
    assert again.returncode == 2
    assert "hydra.run.dir=run: holds another run already" in again.stderr


def test_seed_table() -> None:
    cfg = compose(["benchmark=seed_table", "rounds=3"], name="benchmark")
    layers, options = _arguments(cfg)
    rows = {(r["set"], r["backend"]): r for r in benchmark(layers, **options).rows}
    assert len(rows) == 2 * 4
    for (name, _), found in rows.items():
        first = name == "1x1x3x3 input"
        assert found["shape"] == ("1->16 3x3 on 3x3" if first else "3->7 3x3 s2 on 14x14")
        assert found["batch_size"] == (1 if first else 10)
        assert found["macs_per_image"] == (9 * 16 if first else 9 * 3 * 7 * 6 * 6)
        assert (found["rounds"], found["passes"]) == (3, 1)
        assert found["forward_ms"] > 0
        assert found["backward_ms"] is None
        assert found["output_error"] < 2e-6
        assert found["problem"] == ""


def test_mistakes_are_one_line_each_and_exit_2(tmp_path: Path) -> None:
    wrong = "{in_channels: 4, out_channels: 6, kernel_size: 3, size: 2}"
    done = run(tmp_path, f"shape={wrong}")
    assert (done.returncode, done.stdout) == (2, "")
    first, second = done.stderr.splitlines()
    assert first == "cnntrain: invalid configuration"
    assert second.startswith("  shape: ")
    assert "input size per channel: " in second  # of PyTorch


def test_help_lists_the_options() -> None:
    done = run(ROOT, "--help")
    assert done.returncode == 0
    assert "layers: 1x1, 3x3, depthwise, lenet5, stride2" in done.stdout
    assert "memory_format: contiguous" in done.stdout


def test_number_formats() -> None:
    assert [number(v) for v in (1234.5, 12.345, 1.2345, 0.59, 0.012345, 0)] == [
        "1234", "12.3", "1.23", "0.590", "0.0123", "0",
    ]  # fmt: skip
    assert [times(v) for v in (0.886, 9.876, 12.34)] == ["0.89", "9.88", "12.3"]
