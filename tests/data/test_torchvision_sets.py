"""Sets of torchvision: images, labels, parts and classes against torchvision's own items."""

import gzip
import urllib.request
from collections import Counter
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torchvision.datasets
from torchvision_files import SETS, write

from cnntrain.config import compose
from cnntrain.data import DataError, TorchVisionData, torchvision_sets
from cnntrain.training import train


def data(name: str, folder: Path, **options) -> TorchVisionData:
    split = "letters" if name == "EMNIST" else None
    options = {"download": False, "batch_size": 2, "split": split, **options}
    return TorchVisionData(name=name, root=str(folder), cache=str(folder / "cache"), **options)


def items(mine: TorchVisionData, part: str) -> Counter:
    """Class and pixels of each image that is not augmented or normalised."""
    images, labels, rows = mine.part(part)
    return Counter((mine.classes[labels[row]], images[row].numpy().tobytes()) for row in rows)


def test_all_sets_are_tested():
    assert set(SETS) == set(torchvision_sets.SETS)


@pytest.mark.parametrize("name", SETS)
def test_items_are_those_of_torchvision(name, tmp_path, monkeypatch):
    arguments, names = write(name, tmp_path, monkeypatch)
    mine = data(name, tmp_path)
    mine.prepare()
    assert mine.classes == tuple(n for n in names if n != "N/A")
    mode = "L" if mine.shape[0] == 1 else "RGB"
    assert mode == ("L" if "MNIST" in name or name == "USPS" else "RGB")
    expected = {}
    for part, own in arguments.items():
        original = getattr(torchvision.datasets, name)(str(tmp_path), **own)
        expected[part] = Counter(
            (names[label], np.moveaxis(np.array(image.convert(mode)), -1, 0).tobytes()
             if mode == "RGB" else image.convert(mode).tobytes())
            for image, label in (original[i] for i in range(len(original)))
        )  # fmt: skip
    found = {part: items(mine, part) for part in ("train", "val", "test")}
    assert all(found.values())
    if "all" in expected:
        found = {"all": found["train"] + found["val"] + found["test"]}
    elif "val" not in expected:
        found = {"train": found["train"] + found["val"], "test": found["test"]}
    assert found == expected


def test_order_and_names(tmp_path, monkeypatch):
    write("MNIST", tmp_path, monkeypatch)
    write("DTD", tmp_path, monkeypatch)
    original = torchvision.datasets.MNIST(str(tmp_path), train=False)
    mine = data("MNIST", tmp_path)
    images, _, rows = mine.part("test")
    assert [images[row, 0].tolist() for row in rows] == original.data.tolist()
    assert mine.names("test") == [f"test[{i:06}]" for i in range(4)]
    assert data("DTD", tmp_path).names("val")[0] == "dtd/dtd/images/banded/val1.jpg"


def test_sets_of_one_folder_and_changed_files(tmp_path, monkeypatch):
    """Neither another set nor other content of the same file is taken from the cache."""
    write("MNIST", tmp_path, monkeypatch)
    write("KMNIST", tmp_path, monkeypatch)
    path = tmp_path / "KMNIST/raw/train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:16] + bytes(range(196)) * 40)
    first, second = (items(data(name, tmp_path), "train") for name in ("MNIST", "KMNIST"))
    assert {pixels for _, pixels in first} & {pixels for _, pixels in second} == set()
    assert {pixels for _, pixels in second} == {bytes(range(196)) * 4}
    path.write_bytes(path.read_bytes()[:16] + bytes(7840))
    assert {pixels for _, pixels in items(data("KMNIST", tmp_path), "train")} == {bytes(784)}


@pytest.mark.parametrize(("name", "shape"), [("CIFAR10", [3, 32, 32]), ("GTSRB", [3, 13, 11])])
def test_epoch(name, shape, tmp_path, monkeypatch):
    write(name, tmp_path, monkeypatch)
    options = [f"data.name={name}", f"data.root={tmp_path}", f"data.cache={tmp_path / 'cache'}"]
    small = ["data.size=28", "data.color=grey"] if name == "GTSRB" else []
    few = ["data.batch_size=2", "trainer=cpu", "trainer.max_epochs=1", "tensorboard=scalars"]
    quiet = ["trainer.progress_bar=false"]
    cfg = compose(["data=torchvision", *options, *small, *few, *quiet])
    result = train(cfg, tmp_path / "run")
    assert 0 <= result.metrics["test/acc"] <= 1


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("CIFAR100", "cifar-100-python.tar.gz into ROOT ("),
        ("STL10", "stl10_binary.tar.gz into ROOT ("),
        ("EMNIST", "gzip.zip into ROOT/EMNIST/raw ("),
        ("SVHN", "train_32x32.mat, test_32x32.mat, extra_32x32.mat into ROOT ("),
        ("USPS", "usps.bz2, usps.t.bz2 into ROOT ("),
        ("Food101", "torchvision.datasets.Food101.html describes into ROOT ("),
        ("MNIST", "train-images-idx3-ubyte.gz, train-labels-idx1-ubyte.gz, t10k-images-idx3-ubyte."
                  "gz, t10k-labels-idx1-ubyte.gz into ROOT/MNIST/raw ("),
    ],
)  # fmt: skip
def test_without_a_network(name, files, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise URLError("[Errno -2] Name or service not known")

    monkeypatch.setattr(urllib.request, "urlopen", fail)
    for download, reason in [(True, "Name or service not known"), (False, "data.download=false")]:
        with pytest.raises(DataError) as error:
            data(name, tmp_path / "sets", download=download).prepare()
        line = str(error.value)
        assert "\n" not in line
        assert line.startswith(f"data.root={tmp_path / 'sets'}: has no complete {name} (")
        assert reason in line
        assert files.replace("ROOT", str(tmp_path / "sets")) in line
        assert "data.download=false never downloads" in line


def test_archives_put_into_the_folder_are_unpacked(tmp_path, monkeypatch):
    """As the message says: without a network."""
    monkeypatch.setattr(urllib.request, "urlopen", None)
    write("KMNIST", tmp_path, monkeypatch)
    expected = items(data("KMNIST", tmp_path), "test")
    monkeypatch.setattr("torchvision.datasets.utils.check_md5", lambda *_: True)
    for path in (tmp_path / "KMNIST/raw").iterdir():
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    assert items(data("KMNIST", tmp_path, download=True), "test") == expected


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"name": "cifar10"}, "data.name=cifar10: is not one of.* choose from CIFAR10, CIFAR100"),
        (
            {"name": "VOCDetection"},
            "data.name=VOCDetection: .* detection, .* choose from .*, GTSRB",
        ),
        ({"name": "EMNIST"}, "data.split=None: .* choose from byclass, bymerge, balanced, letters"),
        ({"name": "MNIST", "split": "letters"}, "data.split=letters: .*EMNIST.* leave it out"),
    ],
)
def test_rejected_options(options, problem):
    with pytest.raises(ValueError, match=problem) as error:
        TorchVisionData(**options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("option", "problem"),
    [
        ("data.split=letter", "'letters'"),
        ("data.downlod=false", "data has no option 'downlod'; did you mean 'download'?"),
        ("data.size=0", "data.size=0"),
        ("data.name=CIFAR11", "choose from CIFAR10"),
    ],
)
def test_rejected_by_the_command(option, problem, reject):
    (line,) = reject("data=torchvision", "data.name=EMNIST", "data.split=letters", option)
    assert option in line
    assert problem in line
