"""`cnntrain data inspect` on small folders, counted by hand."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFont

from cnntrain.commands import data as command
from cnntrain.data import FashionMNISTMini, ImageFolder
from cnntrain.lab import duplicates, inspection
from cnntrain.lab.duplicates import FLIPPED, MAX_DISTANCE, near_duplicates
from cnntrain.pictures import font_file


def picture(seed: int, height: int = 40, width: int = 60) -> Image.Image:
    """A smooth picture, as photos are."""
    rough = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(rough).resize((width, height), Image.Resampling.BICUBIC)


def save(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Classes a (9, 1, 1), b (3, 0, 1) and none: duplicates in other parts, a damaged file."""
    root = tmp_path / "photos"
    for seed in range(8):
        save(picture(seed), root / f"train/a/{seed}.png")
    save(picture(20, 30, 30), root / "train/b/small.png")
    save(picture(21, 80, 90).convert("L"), root / "train/b/large.png")
    save(picture(3), root / "test/a/copy.bmp")  # the pixels of train/a/3.png
    save(picture(21, 80, 90).convert("L"), root / "test/b/copy.png")
    save(picture(5).transpose(Image.Transpose.FLIP_LEFT_RIGHT), root / "val/a/flipped.png")
    save(picture(20, 30, 30), root / "train/a/other_label.png")
    (root / "train/none").mkdir()
    (root / "train/b/bad.jpg").write_bytes(b"no image")
    (root / "train/notes.TXT").write_text("x")
    (root / "loose.png").write_bytes(b"x")
    (root / ".hidden").write_text("x")
    return root


def inspect(root: Path, **options: object) -> inspection.Inspection:
    return inspection.inspect(ImageFolder(root=str(root), batch_size=2, **options))[0]


def test_counts(photos: Path) -> None:
    found = inspect(photos)
    assert found.classes["a"] == {"train": 9, "val": 1, "test": 1}
    assert found.classes["b"] == {"train": 3, "val": 0, "test": 1}  # the damaged one included
    assert found.empty_classes == ["train/none"]
    assert found.sizes == [(30, 30), (40, 60), (80, 90)]
    assert found.shape == (3, 32, 32)
    assert found.formats == {"PNG RGB": 11, "PNG L": 2, "BMP RGB": 1}
    assert found.unreadable == {"train/b/bad.jpg": "is not an image, or of an unknown format"}
    assert found.ignored == {".txt": ["train/notes.TXT"], ".png": ["loose.png"]}
    (problem,) = found.problems
    assert "no images of its own in train/none; add some" in problem


def test_duplicates_and_leakage(photos: Path) -> None:
    pairs = {pair.names: pair for pair in inspect(photos).duplicates}
    exact = {
        ("test/a/copy.bmp", "train/a/3.png"),
        ("test/b/copy.png", "train/b/large.png"),
        ("train/a/other_label.png", "train/b/small.png"),
    }
    flipped = ("train/a/5.png", "val/a/flipped.png")
    assert {names for names, pair in pairs.items() if pair.exact} == exact
    assert {names for names, pair in pairs.items() if not pair.exact} == {flipped}
    assert pairs[flipped].parts == ("train", "val")
    other = pairs["train/a/other_label.png", "train/b/small.png"]
    assert other.labels == ("a", "b")


def test_exact_duplicates_without_imagehash(
    photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(inspection, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "imagehash", None)
    found = inspect(photos)
    assert len(found.duplicates) == 3
    command._print(found)
    assert "near duplicates       need imagehash; pip install imagehash" in capsys.readouterr().out


def test_one_class_is_shown(tmp_path: Path) -> None:
    for seed in range(3):
        save(picture(seed), tmp_path / f"set/a/{seed}.png")
    found = inspect(tmp_path / "set")
    assert found.classes == {"a": {"train": 1, "val": 1, "test": 1}}
    assert "has one class only, a" in found.problems[0]
    assert found.formats == {"PNG RGB": 3}


def test_nothing_readable(tmp_path: Path) -> None:
    for name in ("a/1.png", "b/1.png"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(b"")
    found = inspect(tmp_path)
    assert len(found.unreadable) == 2
    assert any("2 of 2 images cannot be decoded" in problem for problem in found.problems)


def test_data_set_in_memory() -> None:
    found, tiles = inspection.inspect(FashionMNISTMini())
    assert sum(own["train"] for own in found.classes.values()) == 4500
    assert sum(own["val"] for own in found.classes.values()) == 500
    assert all(own["test"] == 100 for own in found.classes.values())
    assert found.shape == (1, 28, 28)
    assert {len(own) for own in tiles.values()} == {6}


def test_near_duplicates_are_those_of_all_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "CHUNK", 100)
    rng = np.random.default_rng(0)
    count = 60
    bits = rng.integers(0, 2, (8, 64))[rng.integers(0, 8, count)]
    bits ^= rng.random((count, 64)) < 0.06
    bits[::7] ^= np.tile([0, 1], 32)  # flipped
    hashes = np.packbits(bits, axis=1).view(np.uint64).ravel()
    images = np.tile(rng.integers(0, 256, (16, 8, 1), dtype=np.uint8), (1, 2, 1))
    images = np.concatenate([images[:, :8], images[:, 7::-1]], 1)  # symmetric
    inside = np.tile(images, (count, 1, 1, 1))
    inside[:5] = rng.integers(0, 256, (5, 16, 16, 1))  # of another picture, whatever the hash
    expected = {
        (i, j)
        for i in range(5, count)
        for j in range(i + 1, count)
        for flip in (np.uint64(0), FLIPPED)
        if (int(hashes[i]) ^ int(flip) ^ int(hashes[j])).bit_count() <= MAX_DISTANCE
    }
    assert len(expected) > 50
    assert {(i, j) for i, j in near_duplicates(hashes, inside).tolist()} == expected


@pytest.mark.parametrize("classes", [2, 60])
def test_contact_sheet(classes: int) -> None:
    tile = np.zeros((3, 32, 32), np.uint8)
    names = {f"class {k}": {"train": 2, "val": 0, "test": 0} for k in range(classes)}
    names["\ue000"] = {"train": 0, "val": 0, "test": 0}  # of no font: private use
    found = inspection.Inspection("photos", classes=names)
    sheet, foreign = inspection.contact_sheet(found, {k: [tile] * 2 for k in range(classes)})
    assert foreign == ["\ue000"]
    assert (sheet == 0).all(2).sum() >= classes * 2 * 64 * 64  # enlarged twice


def test_fonts_have_the_characters() -> None:
    assert font_file("Käfer") == ""
    for text in ("Кошка", "γάτα", "قطة"):
        file = font_file(text)
        assert file
        masks = {bytes(ImageFont.truetype(file, 12).getmask(c)) for c in text}
        assert len(masks) == len(set(text))


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["cnntrain data", *arguments])
    try:
        command.main()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def test_usage(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch) == 2
    assert run(monkeypatch, "--help") == 0
    assert capsys.readouterr().out.count("cnntrain data inspect [option=value ...]") == 2
    assert run(monkeypatch, "inspcet") == 2
    assert (
        capsys.readouterr().err == "cnntrain: no command 'data inspcet'; there is: data inspect\n"
    )


def test_lines_and_json(
    photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(photos.parent)
    monkeypatch.setenv("COLUMNS", "10000")
    options = ["inspect", "data.root=photos", "data.batch_size=2"]
    assert run(monkeypatch, *options, "json=found.json") == 1
    shown = capsys.readouterr().out
    for line in (
        "unreadable            1: train/b/bad.jpg: is not an image, or of an unknown format; "
        "data.on_error=skip leaves them out",
        "empty classes         train/none",
        "no validation images  b",
        "imbalance             largest class / smallest: 3 in training; see "
        "loss.class_weights=balanced and data.sampler=balanced",
        "leakage               1 val images have a duplicate in the training set (0 of them with "
        "the same pixels): train/a/5.png ~ val/a/flipped.png",
        "leakage               2 test images have a duplicate in the training set (2 of them with "
        "the same pixels): test/a/copy.bmp = train/a/3.png, test/b/copy.png = train/b/large.png",
        "other labels          1 pairs with different labels: train/a/other_label.png = "
        "train/b/small.png",
    ):
        assert line in shown
    assert Path("outputs/inspect/contact_sheet.png").is_file()
    found = json.loads(Path("found.json").read_text())
    assert found["classes"]["a"] == {"train": 9, "val": 1, "test": 1}
    assert run(monkeypatch, *options, "data.on_error=skip", "json=-", "out=null") == 1
    assert json.loads(capsys.readouterr().out) == found


def test_missing_root_and_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, "inspect", "data.root=nowhere") == 1
    assert "problem  data.root=nowhere: there is no such folder" in capsys.readouterr().out
    assert not os.listdir(tmp_path)
    assert run(monkeypatch, "inspect", "data.root=nowhere", "out=/proc/x", "json=/proc/x.json") == 2
    error = capsys.readouterr().err
    assert "out=/proc/x: " in error
    assert "json=/proc" in error
