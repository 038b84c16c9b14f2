"""Image folders and CSV files: what is found, and the message for what is wrong."""

import codecs
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cnntrain.data import DataError, ImageFolder


def save(path: Path, grey: int = 0, size: tuple[int, int] = (8, 8)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, grey).save(path, "PNG")


def fill(root: Path, *classes: str, count: int = 6) -> None:
    for number, name in enumerate(classes):
        for i in range(count):
            save(root / name / f"{i}.png", 20 * number + i)


def data(root: Path, **options: Any) -> ImageFolder:
    cache = str(root.parent / "cache")
    return ImageFolder(root=str(root), cache=cache, **{"batch_size": 2} | options)


def labels(root: Path, **options: Any) -> dict[str, str]:
    return {entry.name: entry.label for entry in data(root, **options).listed}


def problem(root: Path, **options: Any) -> str:
    """The message of the error, without the name of the root at its beginning."""
    with pytest.raises(DataError) as error:
        data(root, **options).prepare()
    text = str(error.value)
    assert "\n" not in text
    assert str(root) in text
    return text.removeprefix("data.root=").removeprefix(f"{root}: ")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "photos"


def test_pixels_statistics_and_order(root: Path) -> None:
    fill(root, "cat", "dog")
    found = data(root)
    found.prepare()
    assert (found.classes, found.shape) == (("cat", "dog"), (1, 8, 8))
    pixels, numbers = found.read("train")
    assert pixels[:, 0, 0, 0].tolist() == [*range(6), *range(20, 26)]
    assert numbers.tolist() == [0] * 6 + [1] * 6
    own = pixels[found.split()[0]] / 255
    assert np.allclose([found.mean, found.std], [[own.mean()], [own.std()]])
    rows = {part: found.rows[part] for part in ("train", "val", "test")}
    assert {part: len(r) for part, r in rows.items()} == {"train": 8, "val": 2, "test": 2}
    images, expected = next(iter(found.test_loader()))
    grey = (images[:, 0, 0, 0] * found.std[0] + found.mean[0]) * 255
    assert grey.round().int().tolist() == pixels[rows["test"], 0, 0, 0].tolist()
    assert expected.tolist() == numbers[rows["test"]].tolist()


def test_nested_hidden_and_other_files(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    fill(root, "cat", "dog")
    for name in ("cat/a/b/c/1.PNG", "cat/a/2.Jpeg", "dog/3.tiff"):
        save(root / name)
    for name in (".x.png", "cat/.y.png", "cat/.z/1.png", "__MACOSX/cat/1.png", "dog/._3.png"):
        save(root / name)
    for name in ("cat/Thumbs.db", "dog/desktop.ini", "cat/notes.txt", "dog/noname", "loose.png"):
        save(root / name)
    assert sorted({*labels(root)} - {f"{c}/{i}.png" for c in ("cat", "dog") for i in range(6)}) == [
        *("cat/a/2.Jpeg", "cat/a/b/c/1.PNG", "dog/3.tiff"),
    ]
    with caplog.at_level("INFO"):
        data(root).prepare()
    assert f"{root}: ignored cat/notes.txt, dog/noname, loose.png" in caplog.messages


def test_names_in_any_script(root: Path) -> None:
    fill(root, "猫", "کتاب\u200cها", "1", "01", "null", "a b,c", os.fsdecode(b"\xe9t\xe9"))
    save(root / "猫" / os.fsdecode(b"\xff.png"))
    save(root / "猫" / "a\nb.png")
    (root / "cafe\u0301").mkdir()
    save(root / "cafe\u0301/1.png")
    save(root / "caf\u00e9/2.png")
    found = data(root)
    found.prepare()
    names = {"猫", "کتاب\u200cها", "1", "01", "null", "a b,c", "\\udce9t\\udce9", "caf\u00e9"}
    assert {*found.classes} == names
    assert len(found.listed) == 7 * 6 + 4


@pytest.mark.parametrize("name", ["???", "a${x}"])
def test_names_that_a_config_cannot_contain(root: Path, name: str) -> None:
    fill(root, "cat", name)
    assert problem(root) == f"{name} cannot be a name in a config; rename it"


def test_parts(root: Path) -> None:
    fill(root / "Train", "cat", "dog")
    fill(root / "validation", "cat", "dog", count=2)
    found = data(root)
    assert {len(rows) for rows in (found.rows["train"],)} == {10}
    assert [found.listed[row].name for row in found.rows["val"]] == [
        f"validation/{c}/{i}.png" for c in ("cat", "dog") for i in range(2)
    ]
    fill(root / "test", "dog", count=3)
    assert [len(rows) for rows in data(root).rows.values()] == [12, 4, 3]


def test_class_with_the_name_of_a_part(root: Path) -> None:
    fill(root, "train", "bus", "car")
    save(root / "train/steam/1.png")
    assert {*labels(root).values()} == {"train", "bus", "car"}


def test_links(root: Path, tmp_path: Path) -> None:
    fill(root, "cat", "dog")
    fill(tmp_path, "elsewhere")
    (root / "bird").symlink_to(tmp_path / "elsewhere")
    (root / "cat/up").symlink_to(root)
    (root / "cat/far up").symlink_to("/")
    (root / "cat/self").symlink_to(".")
    (root / "dog/7.png").symlink_to(root / "dog/1.png")
    found = data(root)
    assert [entry.label for entry in found.listed] == ["bird"] * 6 + ["cat"] * 6 + ["dog"] * 7
    assert found.ignored == ["cat/far up", "cat/self", "cat/up"]
    (root / "also cat").symlink_to("cat")
    assert problem(root).startswith("no images of its own in cat;")  # of another class


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: None, "there is no such folder or file"),
        (save, "is neither a folder nor a CSV file"),
        (lambda root: root.mkdir(), "contains no images; put images into"),
        (lambda root: save(root / "1.png"), "contains 1 images, but no class folders"),
        (lambda root: fill(root, "cat"), "has one class only, cat; two are needed"),
        (
            lambda root: (fill(root, "a", "b"), (root / "c").mkdir()),
            "no images of its own in c; add some",
        ),
        (lambda root: save(root / "test/a/1.png"), "has one class only, test"),
        (
            lambda root: (fill(root / "train", "a"), fill(root / "val", "a", "b")),
            "b without training images",
        ),
        (lambda root: (fill(root / "train", "a", "b"), fill(root, "c")), "c: neither train, val"),
        (
            lambda root: (fill(root / "train", "a", "b"), save(root / "test/1.png")),
            "no images of its own in test; add some",
        ),
        (lambda root: fill(root, "a", "b", count=4), "data.batch_size=20: is more than the 4"),
    ],
)
def test_wrong_folders(root: Path, make: Any, message: str) -> None:
    make(root)
    options = {"batch_size": 20} if "batch_size" in message else {}
    if options:
        with pytest.raises(DataError, match=message):
            data(root, **options).prepare()
    else:
        assert problem(root).startswith(message)


def test_damaged_images(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    fill(root, "cat", "dog", count=30)
    for i in range(6):
        (root / f"cat/{i}.png").write_bytes(b"")
        (root / f"dog/{i}.png").write_bytes((root / f"dog/{i}.png").read_bytes()[:-30])
    text = problem(root)
    assert text.startswith("12 of 60 images cannot be decoded: cat/0.png: is not an image")
    assert text.count("dog/") == 4
    assert text.endswith(
        " and 2 more; repair or remove them, or leave them out with data.on_error=skip"
    )
    found = data(root, on_error="skip")
    found.prepare()
    assert sum(map(len, found.rows.values())) == 48
    assert f"{root}: left out cat/0.png: is not an image" in caplog.text
    for i in range(30):
        (root / f"cat/{i}.png").write_bytes(b"x")
    assert "cat without training images" in problem(root, on_error="skip")


def table(root: Path, text: str | bytes, name: str = "list.csv") -> Path:
    fill(root, "a", "b", count=8)
    content = text.encode() if isinstance(text, str) else text
    (root / name).write_bytes(content)
    return root / name


ROWS = [f"a/{i}.png,x" for i in range(8)] + [f"b/{i}.png,y" for i in range(8)]
EXPECTED = {f"a/{i}.png": "x" for i in range(8)} | {f"b/{i}.png": "y" for i in range(8)}
TEXT = "\n".join(["path,label", *ROWS])


@pytest.mark.parametrize(
    "text",
    [
        TEXT,
        codecs.BOM_UTF8 + TEXT.encode(),
        TEXT.replace("\n", "\r\n"),
        TEXT.replace("\n", "\r"),
        TEXT.replace("\n", "\n\n") + "\n,\n",
        TEXT.replace(",", ";"),
        TEXT.replace(",", "\t"),
        TEXT.replace(",", " | "),
        TEXT.replace("path,label", " PATH , Label "),
        TEXT.replace(",x", ',"x"'),
        TEXT.replace("a/", "./a/../a/"),
        TEXT.replace("/", "\\"),
        f"{TEXT}\n".replace("\n", ",,\n"),
        "\n".join(",".join(reversed(row.split(","))) for row in TEXT.split("\n")),
    ],
)
def test_csv(root: Path, text: str | bytes) -> None:
    assert labels(table(root, text)) == EXPECTED


def test_csv_with_absolute_paths(root: Path, tmp_path: Path) -> None:
    save(tmp_path / "elsewhere.png")
    rows = [f"{root}/{row}" for row in ROWS]
    text = "\n".join(["path,label", *rows, f"{tmp_path}/elsewhere.png,x", "../photos/../e2.png,x"])
    save(tmp_path / "e2.png")
    outside = {f"{tmp_path}/elsewhere.png": "x", "../e2.png": "x"}
    assert labels(table(root, text)) == EXPECTED | outside


def test_csv_quoting(root: Path) -> None:
    save(root / 'a,"b"\u2028\x0c.png')
    text = TEXT + '\n"a,""b""\u2028\x0c.png","two\nlines, 01"\n'
    found = labels(table(root, text))
    assert found == EXPECTED | {'a,"b"\u2028\x0c.png': "two\nlines, 01"}


def test_csv_split(root: Path) -> None:
    parts = ["Train"] * 4 + ["valid", "", "TEST", "testing"]
    rows = [f"{row},{part}" for row, part in zip(ROWS, parts * 2, strict=True)]
    found = data(table(root, "\n".join(["path,label,split", *rows])))
    assert {part: len(rows) for part, rows in found.rows.items()} == {
        "train": 10,
        "val": 2,
        "test": 4,
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no columns path; its first line must name path,label"),
        ("file,label\n", "has no columns path"),
        ("path;label,class\n", "has no columns path"),
        ("path,label,label\n", "has 2 columns label"),
        ("path,label\n", "lists no images"),
        (TEXT + "\nnone.png,x", "1 files do not exist: none.png (line 18); paths are relative"),
        (TEXT + "\na,x", "1 files do not exist: a (line 18)"),
        (TEXT + f"\n{'n' * 3000},x\n\0,x", "2 files do not exist"),
        (TEXT + "\na/0.png,x", "line 18: a/0.png is listed already, as line 2; remove"),
        (TEXT + "\n./a/0.png,y", "line 18: ./a/0.png is listed already, with another label in"),
        (TEXT + "\na/9.png", "line 18: has 1 cells instead of 2"),
        (TEXT + "\na/9.png,x,y", "line 18: has 3 cells instead of 2"),
        (TEXT + "\n,x", "line 18: has no path"),
        (TEXT + "\na/9.png, ", "line 18: has no label"),
        (TEXT.replace("a/3.png,x", 'a/3.png,"x'), "line 17: unexpected end of data; correct"),
        (
            TEXT.replace("\n", ",nowhere\n").replace("el,nowhere", "el,split"),
            "line 2: split is 'now",
        ),
        (TEXT.encode("utf-16"), "is not UTF-8"),
        (TEXT.replace("x", "é").encode("latin-1"), "is not UTF-8 (invalid continuation byte)"),
        ("path,label\n" + "a" * 200_000, "line 2: field larger than field limit"),
    ],
)
def test_wrong_csv(root: Path, text: str | bytes, message: str) -> None:
    assert problem(table(root, text)).startswith(message)


def test_csv_with_missing_files_to_skip(root: Path) -> None:
    file = table(root, TEXT + "\nnone.png,x")
    found = data(file, on_error="skip")
    found.prepare()
    assert sum(map(len, found.rows.values())) == 16


def test_file_names(root: Path, tmp_path: Path) -> None:
    assert labels(table(root, TEXT, "LIST.CSV")) == EXPECTED
    assert problem(table(root, TEXT, "list.xlsx")).startswith("is neither a folder nor a CSV file")
    os.mkfifo(tmp_path / "pipe.csv")
    assert problem(tmp_path / "pipe.csv").startswith("is neither a folder nor a CSV file")
