"""What the data sets hold, and how they are split."""

import inspect
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from cnntrain.data import (
    DataError,
    FashionMNIST,
    FashionMNISTMini,
    ImageData,
    fashion_mnist,
)
from cnntrain.data.fashion_mnist import FILES, MINI_FILES, MINI_FOLDER
from cnntrain.data.idx import read_idx

CONF = Path(__file__).parents[2] / "conf" / "data"


@pytest.mark.parametrize(("cls", "total"), [(FashionMNIST, 60_000), (FashionMNISTMini, 5_000)])
def test_split_is_disjoint_complete_and_fixed(cls, total):
    train, val = cls().split()
    assert len(val) == total // (12 if total == 60_000 else 10)
    assert sorted([*train, *val]) == list(range(total))
    torch.manual_seed(5)
    np.testing.assert_array_equal(cls().split()[1], val)
    assert set(cls(split_seed=1).split()[1]) != set(val)
    assert set(val) < set(cls(val_size=len(val) + 1).split()[1])


def test_split_of_the_whole_set_is_this_one_for_good():
    train, val = FashionMNIST().split()
    assert val[:5].tolist() == [2, 3, 11, 13, 20]
    assert int(val.sum()) == 148_902_005
    assert len(train) + len(val) == 60_000


def test_too_large_a_validation_set_names_the_option():
    FashionMNISTMini(val_size=4999)
    with pytest.raises(ValueError, match=r"data\.val_size=5000 .* choose at most 4999"):
        FashionMNISTMini(val_size=5000)


def test_mini_set():
    data = FashionMNISTMini()
    (train, labels), (test, test_labels) = data.read("train"), data.read("test")
    assert (train.shape, test.shape) == ((5000, 1, 28, 28), (1000, 1, 28, 28))
    assert np.bincount(labels).tolist() == [500] * 10
    assert np.bincount(test_labels).tolist() == [100] * 10
    images = {image.tobytes() for image in [*train, *test]}
    assert len(images) == 6000
    # The whole set's mean and deviation, which are also this one's normalisation.
    assert train.mean() / 255 == pytest.approx(data.mean[0], abs=0.003)
    assert train.std() / 255 == pytest.approx(data.std[0], abs=0.003)
    assert sum(path.stat().st_size for path in MINI_FOLDER.iterdir()) < 3_000_000
    assert "Zalando SE" in (MINI_FOLDER / "LICENSE").read_text()


def test_damaged_mini_file(tmp_path, monkeypatch):
    for path in MINI_FOLDER.glob("*.gz"):
        (tmp_path / path.name).write_bytes(path.read_bytes()[:-1])
    monkeypatch.setattr(fashion_mnist, "MINI_FOLDER", tmp_path)
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte.gz: .*; install cnntrain again"):
        FashionMNISTMini().prepare()


def test_mini_set_is_drawn_from_the_real_one():
    cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    data = FashionMNIST(root=f"{cache}/cnntrain/fashion_mnist")
    for split, files in MINI_FILES.items():
        paths = [data.root / file.name for file in FILES[split]]
        if not all(path.is_file() for path in paths):
            pytest.skip(f"the real set is not in {data.root}")
        real, labels = map(read_idx, paths)
        known = {(image.tobytes(), label) for image, label in zip(real, labels, strict=True)}
        mini, mini_labels = (read_idx(MINI_FOLDER / f"{file.name}.gz") for file in files)
        pairs = {(i.tobytes(), label) for i, label in zip(mini, mini_labels, strict=True)}
        assert pairs <= known


@pytest.mark.parametrize(
    ("name", "cls"), [("fashion_mnist", FashionMNIST), ("fashion_mnist_mini", FashionMNISTMini)]
)
def test_config_has_every_option_and_its_default(name, cls):
    config = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    assert config.pop("_target_") == f"cnntrain.data.{cls.__name__}"
    options = [p for c in (ImageData, cls) for p in inspect.signature(c).parameters.values()]
    defaults = {p.name: p.default for p in options if p.kind is p.KEYWORD_ONLY}  # cls's own win
    root = config.get("root", "").replace("${oc.env:XDG_CACHE_HOME,'~/.cache'}", "~/.cache")
    assert {**config, **({"root": root} if root else {})} == defaults
    cls(**config)
