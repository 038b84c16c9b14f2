"""Arrays in .npz files: every layout against the arrays themselves, and what is rejected."""

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest

from cnntrain.config import compose
from cnntrain.data import Arrays, DataError, arrays, decoded
from cnntrain.training import train

RANDOM = np.random.default_rng(0)
GREY = RANDOM.integers(0, 256, (40, 7, 9), dtype=np.uint8)
COLOUR = RANDOM.integers(0, 256, (40, 7, 9, 3), dtype=np.uint8)
LABELS = np.arange(40) % 3
PARTS = ("train", "val", "test")


def data(path: Path, **options) -> Arrays:
    return Arrays(root=str(path), cache=str(path.parent / "cache"), batch_size=4, **options)


def save(path: Path, *, compressed: bool = True, **content) -> Path:
    (np.savez_compressed if compressed else np.savez)(path, **content)
    return path


def rows(names: list[str]) -> list[int]:
    return [int(name.partition("[")[2].rstrip("]")) for name in names]


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize(
    ("images", "wanted"),
    [
        (GREY, GREY[:, None]),
        (GREY[..., None], GREY[:, None]),
        (GREY[:, None], GREY[:, None]),
        (COLOUR, COLOUR.transpose(0, 3, 1, 2)),
        (COLOUR.transpose(0, 3, 1, 2), COLOUR.transpose(0, 3, 1, 2)),
        (np.asfortranarray(COLOUR), COLOUR.transpose(0, 3, 1, 2)),
    ],
)
def test_layouts(images, wanted, compressed, tmp_path):
    mine = data(save(tmp_path / "a.npz", images=images, labels=LABELS, compressed=compressed))
    mine.prepare()
    assert (mine.shape, mine.classes) == (wanted.shape[1:], ("0", "1", "2"))
    found = []
    for part in PARTS:
        pixels, labels, own = mine.part(part)
        numbers = rows(mine.names(part))
        found += numbers
        assert len(own)
        assert (pixels[own].numpy() == wanted[numbers]).all()
        assert labels[own].tolist() == LABELS[numbers].tolist()
    assert sorted(found) == list(range(40))
    assert not list((tmp_path / "cache").glob("*/*.part"))
    assert {path.name for path in (tmp_path / "cache").iterdir() if path.is_file()} == set()


def medmnist(**other) -> dict[str, np.ndarray]:
    """Arrays as in MedMNIST's files; every training image is different from the others."""
    sizes = {"train": 24, "val": 6, "test": 10}
    content, start = {}, 0
    for part, size in sizes.items():
        own = slice(start, start + size)
        content |= {f"{part}_images": COLOUR[own], f"{part}_labels": LABELS[own, None].astype("u1")}
        start += size
    return content | other


def test_parts_of_medmnist(tmp_path):
    mine = data(save(tmp_path / "m.npz", **medmnist()))
    mine.prepare()
    start = 0
    for part in PARTS:
        pixels, labels, own = mine.part(part)
        assert mine.names(part) == [f"{part}_images[{i}]" for i in range(len(own))]
        assert (pixels[own].numpy() == COLOUR[start:][: len(own)].transpose(0, 3, 1, 2)).all()
        assert labels[own].tolist() == LABELS[start:][: len(own)].tolist()
        start += len(own)
    assert start == 40


@pytest.mark.parametrize(
    ("content", "classes"),
    [
        ({"labels": LABELS * 5 + 1}, ("1", "6", "11")),
        ({"labels": np.array(["zebra", "cat", "ant"])[LABELS]}, ("ant", "cat", "zebra")),
        ({"labels": LABELS, "classes": ["zebra", "cat", "ant"]}, ("zebra", "cat", "ant")),
        (
            {
                "labels": np.array(["zebra", "cat", "ant"])[LABELS],
                "classes": ["cat", "zebra", "ant"],
            },
            ("cat", "zebra", "ant"),
        ),
    ],
)
def test_classes(content, classes, tmp_path):
    mine = data(save(tmp_path / "a.npz", images=GREY, **content))
    mine.prepare()
    assert mine.classes == classes
    names = content.get("classes") if content["labels"].dtype.kind == "i" else None
    wanted = [names[k] if names else str(k) for k in content["labels"]]
    assert [mine.classes[k] for k in mine.labels] == wanted


def test_large_images_keep_their_size(tmp_path):
    images = RANDOM.integers(0, 256, (12, 300, 230), dtype=np.uint8)
    path = save(tmp_path / "a.npz", images=images, labels=np.arange(12) % 2)
    mine = data(path)
    mine.prepare()
    assert mine.shape == (1, 300, 230)
    small = data(path, size=8, color="rgb")
    small.prepare()
    assert small.shape == (3, 8, 8)


def test_changed_file_is_decoded_anew(tmp_path):
    path = save(tmp_path / "a.npz", images=GREY, labels=LABELS, compressed=False)
    data(path).prepare()
    save(path, images=255 - GREY, labels=LABELS, compressed=False)
    mine = data(path)
    assert (mine.read("train")[0][:, 0] == 255 - GREY).all()


def test_each_array_is_decompressed_once(tmp_path, monkeypatch):
    """By many threads, and not at all if the images are in the cache."""
    calls = []
    original = Arrays._decompressed
    monkeypatch.setattr(Arrays, "_decompressed", lambda s, n: calls.append(n) or original(s, n))
    monkeypatch.setattr("cnntrain.data.image_cache.BATCH", 2)
    monkeypatch.setattr("cnntrain.data.image_cache.cores", lambda: 8)
    path = save(tmp_path / "m.npz", **medmnist())
    for _ in range(2):
        mine = data(path)
        mine.prepare()
        assert sorted(calls) == ["test_images", "train_images", "val_images"]
        assert not mine._arrays


def test_epoch(tmp_path):
    images = RANDOM.integers(0, 256, (60, 28, 28), dtype=np.uint8)
    path = save(tmp_path / "a.npz", images=images, labels=np.arange(60) % 3)
    options = [f"data.root={path}", f"data.cache={tmp_path / 'cache'}", "data.batch_size=8"]
    few = ["trainer=cpu", "trainer.max_epochs=1", "tensorboard=scalars"]
    cfg = compose(["data=arrays", *options, *few, "trainer.progress_bar=false"])
    assert train(cfg, tmp_path / "run").metrics["test/acc"] <= 1


def with_label(row: int, value: int) -> np.ndarray:
    labels = LABELS.copy()
    labels[row] = value
    return labels


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ({"images": GREY.astype(float)}, "images is float64; convert it to uint8"),
        ({"images": GREY.astype("u2")}, "images is uint16; convert it to uint8"),
        ({"images": np.array([None] * 40)}, "images is object; convert it to uint8"),
        ({"labels": LABELS.astype(object)}, "labels: Object arrays cannot be loaded"),
        ({"labels": LABELS.astype(float)}, "labels is float64 (40,) instead of integers or"),
        ({"labels": LABELS[1:]}, "labels is int64 (39,) instead of integers or strings (40,)"),
        ({"labels": np.eye(40, dtype=int)}, "labels is int64 (40, 40) instead of"),
        ({"labels": with_label(7, -1)}, "labels[7] is -1 instead of 0 or more"),
        (
            {"labels": with_label(7, 3), "classes": ["a", "b", "c"]},
            "labels[7] is 3 instead of 0 to 2",
        ),
        ({"images": GREY[:0], "labels": LABELS[:0]}, "images is empty: (0, 7, 9)"),
        ({"images": GREY[0]}, "images has shape (7, 9) instead of (N, H, W), (N, H, W, C) or"),
        (
            {"images": np.zeros((40, 8, 8, 4), np.uint8)},
            "images has shape (40, 8, 8, 4) instead of",
        ),
        ({"labels": LABELS * 0}, "has one class only, 0; two are needed"),
    ],
)
def test_rejected_arrays(content, problem, tmp_path):
    path = save(tmp_path / "a.npz", **{"images": GREY, "labels": LABELS, **content})
    assert problem in message(path)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ({"x": GREY, "y": LABELS}, "has no array images and labels, but x, y; save images and"),
        ({"train_images": GREY}, "has no array train_labels, but train_images; save"),
        (medmnist(val_images=None), "val_images is object"),
        ({"test_images": GREY, "test_labels": LABELS}, "has no array images and labels, but test_"),
        ({}, "has no array images and labels, but nothing"),
    ],
)
def test_missing_arrays(content, problem, tmp_path):
    assert problem in message(save(tmp_path / "a.npz", **content))


def message(path: Path, **options) -> str:
    with pytest.raises(DataError) as error:
        data(path, **options).prepare()
    text = str(error.value)
    assert "\n" not in text
    assert str(path) in text
    return text


def damaged(path: Path, how: str) -> Path:
    save(path, images=GREY, labels=LABELS, compressed=False)
    content = path.read_bytes()
    if how == "cut":
        path.write_bytes(content[:-100])
    elif how == "byte":
        path.write_bytes(content.replace(GREY[20:22].tobytes(), bytes(126)))
    elif how == "short":  # the header promises more than there is
        whole = io.BytesIO()
        np.save(whole, GREY)
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("images.npy", whole.getvalue()[:-100])
            archive.writestr("labels.npy", zipfile.ZipFile(io.BytesIO(content)).read("labels.npy"))
    elif how == "npy":
        with path.open("wb") as file:
            np.save(file, GREY)
    elif how == "text":
        path.write_text("images,labels")
    return path


@pytest.mark.parametrize(
    ("how", "problem"),
    [
        ("cut", "File is not a zip file; name an .npz file"),
        ("byte", "Bad CRC-32 for file 'images.npy'"),
        ("short", "mmap length is greater than file size"),
        ("npy", "File is not a zip file; name an .npz file"),
        ("text", "File is not a zip file; name an .npz file"),
    ],
)
def test_damaged_files(how, problem, tmp_path):
    path = damaged(tmp_path / "a.npz", how)
    assert problem in message(path)
    assert problem in message(path, on_error="skip")


def test_no_file(tmp_path):
    assert "No such file or directory; name an .npz file" in message(tmp_path / "a.npz")
    assert "Is a directory; name an .npz file" in message(tmp_path)


def test_full_disk(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(arrays.shutil, "copyfileobj", fail)
    text = message(save(tmp_path / "a.npz", images=GREY, labels=LABELS))
    assert text.startswith(f"data.cache={tmp_path / 'cache'}: has no room for images of ")
    assert "No space left on device" in text
    assert decoded.CACHE not in text
