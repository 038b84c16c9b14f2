"""`cnntrain export`: files with the same logits in onnxruntime and torch.export."""

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from finished_runs import command, finished, plain_network
from torch import Tensor, nn

from cnntrain.config import ConfigError
from cnntrain.data import DataError, FashionMNISTMini
from cnntrain.inference import ExportError, export, exporting

BACKENDS = ["native", "im2col"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("export")
    few = "+trainer.limit_train_batches=10"
    return {name: finished(folder / name, f"backend={name}", few) for name in BACKENDS}


def images(count: int) -> Tensor:
    return FashionMNISTMini().test_loader().rows(torch.arange(count))


def facts(file: Path) -> dict[str, str]:
    session = onnxruntime.InferenceSession(str(file))
    return session.get_modelmeta().custom_metadata_map


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("format", ["onnx", "torch"])
def test_same_logits_for_any_batch_size(
    runs: dict[str, Path], backend: str, format: str, tmp_path: Path
) -> None:
    found = export(runs[backend], format, folder=tmp_path)
    assert found.file == tmp_path / ("best.onnx" if format == "onnx" else "best.pt2")
    assert found.error < 1e-4
    assert found.images == found.same == 256
    assert [file.name for file in tmp_path.iterdir()] == [found.file.name]
    network = plain_network(runs[backend])
    if format == "onnx":
        session = onnxruntime.InferenceSession(str(found.file))

        def run(batch: Tensor) -> Tensor:
            return torch.from_numpy(session.run(["logits"], {"images": batch.numpy()})[0])
    else:
        run = torch.export.load(str(found.file)).module()
    for size in (1, 3, 500):
        with torch.no_grad():
            wanted = network(images(size))
        torch.testing.assert_close(run(images(size)), wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("format", ["onnx", "torch"])
def test_normalisation_within_the_file(
    runs: dict[str, Path], format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(self, split: str) -> None:
        raise DataError("is not here")

    raw = torch.tensor(FashionMNISTMini().read("test")[0][:5])
    inputs = images(5)
    monkeypatch.setattr(FashionMNISTMini, "read", missing)
    found = export(runs["native"], format, normalise=True, folder=tmp_path)
    assert (found.kind, found.images) == ("random", 256)
    if format == "onnx":
        session = onnxruntime.InferenceSession(str(found.file))
        logits = torch.from_numpy(session.run(["logits"], {"images": raw.numpy()})[0])
    else:
        logits = torch.export.load(str(found.file)).module()(raw)
    with torch.no_grad():
        wanted = plain_network(runs["native"])(inputs)
    torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("format", ["onnx", "torch"])
def test_metadata_and_paths(runs: dict[str, Path], format: str, tmp_path: Path) -> None:
    file = export(runs["im2col"], format, checkpoint="last", folder=tmp_path).file
    if format == "onnx":
        found = facts(file)
        found = {k: json.loads(v) if v[0] == "[" or v.isdigit() else v for k, v in found.items()}
    else:
        extra = {"cnntrain.json": ""}
        torch.export.load(str(file), extra_files=extra)
        found = json.loads(extra["cnntrain.json"])
    content = file.read_bytes()  # without paths of this machine
    for path in (Path(exporting.__file__).parents[2], Path(torch.__file__).parents[1], tmp_path):
        assert str(path).encode() not in content
    assert b"stack_trace" not in content
    assert found["classes"] == list(FashionMNISTMini.classes)
    assert (found["mean"], found["std"], found["shape"]) == ([0.2860], [0.3530], [1, 28, 28])
    assert found["trained_on"] == "cnntrain.conv.Im2colConv2d"
    raw = FashionMNISTMini().read("test")[0][:5]
    by_hand = (raw / 255 - np.array(found["mean"])) / np.array(found["std"])
    assert np.abs(by_hand - images(5).numpy()).max() < 1e-6


def test_other_networks(tmp_path: Path) -> None:
    """Depthwise convolutions, squeeze and excitation; a single output."""
    mobile = ["model=torchvision", "model.name=mobilenet_v3_small", "model.small_images=true"]
    few = ["backend=native", "data.eval_batch_size=16"]
    few += [f"+trainer.limit_{stage}_batches=1" for stage in ("train", "val", "test")]
    for name, options in {
        "mobile": [*mobile, *few],
        "signs": ["experiment=shallow_by_hand", "data=two_signs"],
    }.items():
        run = finished(tmp_path / name, *options, "trainer.max_epochs=1")
        for format in ("onnx", "torch") if name == "signs" else ("onnx",):
            found = export(run, format)
            assert found.error <= 1e-4 * max(1, found.largest)


class Doubled(nn.Conv2d):
    """No convolution."""

    def _conv_forward(self, *arguments: Tensor) -> Tensor:
        return 2 * super()._conv_forward(*arguments)


def test_mismatch_is_an_error_and_leaves_no_file(tmp_path: Path) -> None:
    few = ["backend._target_=test_export.Doubled", "+trainer.limit_train_batches=2"]
    run = finished(tmp_path / "run", *few, "model=shallow")
    for format in ("onnx", "torch"):
        with pytest.raises(
            ExportError, match=r"logits of 1 images differ by [\d.e-]+ from those of"
        ):
            export(run, format)
    assert not list((run / "export").iterdir())
    (tmp_path / "test_export.py").write_text(
        "from torch import nn\n\n\nclass Doubled(nn.Conv2d):\n"
        "    def _conv_forward(self, *a):\n        return 2 * super()._conv_forward(*a)\n"
    )
    done = command("export", f"run={run}", "format=torch", cwd=tmp_path)
    assert done.returncode == 1
    assert "best.pt2: logits of 1 images differ by" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (run / "export").exists()


class Scaled(nn.Conv2d):
    """With a parameter that nn.Conv2d does not have."""

    def __init__(self, *arguments, **options) -> None:
        super().__init__(*arguments, **options)
        self.scale = nn.Parameter(torch.tensor(1.5))

    def _conv_forward(self, *arguments: Tensor) -> Tensor:
        return self.scale * super()._conv_forward(*arguments)


class Branching(nn.Conv2d):
    """Branches on values, which cannot be exported."""

    def __init__(self, *arguments, **options) -> None:
        super().__init__(*arguments, **options)
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) if images.sum() > 0 else -super().forward(images)


def test_backend_with_other_parameters(tmp_path: Path) -> None:
    few = ["model=shallow", "+trainer.limit_train_batches=2", "trainer.max_epochs=1"]
    run = finished(tmp_path / "run", "backend._target_=test_export.Scaled", *few)
    for format in ("onnx", "torch"):
        assert export(run, format).same == 256
    run = finished(tmp_path / "branching", "backend._target_=test_export.Branching", *few)
    for format in ("onnx", "torch"):
        message = f"format={format}: PyTorch cannot export this net"
        with pytest.raises(ExportError, match=message) as e:
            export(run, format)
        assert "\n" not in str(e.value)
    assert not list((run / "export").iterdir())


def test_existing_file_is_kept_if_the_new_one_differs(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = export(runs["native"], "torch", folder=tmp_path).file
    before = file.read_bytes()
    monkeypatch.setattr(exporting, "TOLERANCE", -1.0)
    with pytest.raises(ExportError):
        export(runs["native"], "torch", folder=tmp_path)
    assert file.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_missing_packages(runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "find_spec", lambda name: None if name == "onnxscript" else 1)
    with pytest.raises(
        ConfigError, match=r"format=onnx: needs onnxscript; pip install onnxscript$"
    ):
        export(runs["native"], "onnx")


def test_command(runs: dict[str, Path], tmp_path: Path) -> None:
    done = command(
        "export", f"run={runs['im2col']}", "format=onnx", "checkpoint=last", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    assert "compared with Im2colConv2d on 256 validation images" in done.stdout
    assert "same class                      256 of 256" in done.stdout
    assert (runs["im2col"] / "export/last.onnx").exists()
    done = command("export", f"run={runs['native']}", "format=onx", cwd=tmp_path)
    assert done.returncode == 2
    assert "format=onx: input should be 'onnx' or 'torch'" in done.stderr
