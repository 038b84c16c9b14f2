"""`cnntrain predict`: images of every size and format, and unreadable files."""

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from finished_runs import command, finished, plain_network
from idx_files import idx_bytes
from PIL import Image

from cnntrain.config import ConfigError
from cnntrain.data import Decoder, FashionMNISTMini
from cnntrain.inference import predict
from cnntrain.inference.images import find_images, read_images

SHAPE = (1, 28, 28)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished(tmp_path_factory.mktemp("predict") / "run", "model=shallow")


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return FashionMNISTMini().read("test")[0][:, 0]  # (N, 28, 28)


def one(file: Path, **options: object) -> np.ndarray:
    (picture,) = read_images(file, Decoder(SHAPE, "pad", **options))
    assert picture.error is None
    return picture.pixels


def error(file: Path, shape: tuple[int, int, int] = SHAPE) -> str:
    (picture,) = read_images(file, Decoder(shape, "pad"))
    assert picture.pixels is None
    return picture.error


def test_grey_image_of_the_right_size_is_not_changed(tmp_path: Path, pixels) -> None:
    Image.fromarray(pixels[0]).save(tmp_path / "a.png")
    assert (one(tmp_path / "a.png") == pixels[0]).all()
    assert (one(tmp_path / "a.png", invert=True) == 255 - pixels[0]).all()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_every_mode_of_png(mode: str, tmp_path: Path) -> None:
    black_and_white = np.zeros((28, 28), np.uint8)
    black_and_white[4:20, 10:15] = 255
    image = Image.fromarray(black_and_white)
    if mode == "I;16":
        image = Image.fromarray(black_and_white.astype(np.uint16) * 257)
    else:
        image = image.convert(mode)
    image.save(tmp_path / "a.png")
    assert (one(tmp_path / "a.png") == black_and_white).all()


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_every_mode_of_jpeg(mode: str, tmp_path: Path) -> None:
    image = Image.new("L", (280, 280), 200)
    image.convert(mode).save(tmp_path / "a.jpg", quality=95)
    assert np.abs(one(tmp_path / "a.jpg").astype(int) - 200).max() <= 3


def test_grey_input(tmp_path: Path) -> None:
    Image.new("RGB", (28, 28), (10, 200, 60)).save(tmp_path / "a.png")
    grey = 0.299 * 10 + 0.587 * 200 + 0.114 * 60
    assert np.abs(one(tmp_path / "a.png") - grey).max() <= 1


def test_colour_input() -> None:
    source = "name", Image.new("RGB", (8, 8), (10, 200, 60))
    (found,) = read_images(source, Decoder((3, 4, 4), "pad"))
    assert found.pixels.shape == (3, 4, 4)
    assert found.pixels[:, 2, 2].tolist() == [10, 200, 60]


def test_other_aspect_ratios_are_padded(tmp_path: Path) -> None:
    Image.new("L", (560, 280), 255).save(tmp_path / "wide.png")
    wide = one(tmp_path / "wide.png")[0]
    assert (wide[7:21] == 255).all()
    assert (wide[:7] == 0).all()
    assert (wide[21:] == 0).all()
    Image.new("L", (7, 7), 0).save(tmp_path / "ink.png")
    assert (one(tmp_path / "ink.png", invert=True) == 255).all()


def test_downscaling_is_antialiased(tmp_path: Path) -> None:
    stripes = np.zeros((280, 280), np.uint8)
    stripes[:, ::2] = 200
    Image.fromarray(stripes).save(tmp_path / "a.png")
    assert np.abs(one(tmp_path / "a.png")[0, 5:-5, 5:-5].astype(int) - 100).max() <= 3


@pytest.mark.parametrize("invert", [False, True])
def test_transparent_pixels_become_background(invert: bool, tmp_path: Path) -> None:
    image = Image.new("RGBA", (28, 28), (255, 255, 255, 0) if not invert else (0, 0, 0, 0))
    image.paste((0, 0, 0, 255) if invert else (255, 255, 255, 255), (10, 10, 18, 18))
    image.save(tmp_path / "a.png")
    found = one(tmp_path / "a.png", invert=invert)[0]
    assert (found[10:18, 10:18] == 255).all()
    assert found.sum() == 64 * 255


def test_exif_orientation(tmp_path: Path) -> None:
    upright = np.zeros((28, 28), np.uint8)
    upright[:14] = 255
    image = Image.fromarray(np.rot90(upright))
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    image.save(tmp_path / "a.jpg", exif=exif, quality=100)
    found = one(tmp_path / "a.jpg")[0]
    assert found[:12].min() > 240
    assert found[16:].max() < 15


def test_damaged_exif_is_ignored(tmp_path: Path) -> None:
    exif = b"Exif\0\0MM\0*\0\0\0\x08" + b"\0\2\1\x12\0\3\0\0\0\1\0\6\0\0"
    for damage in range(20):
        block = bytearray(exif + bytes(40))
        for position in np.random.default_rng(damage).integers(6, len(block), 4):
            block[position] = int(np.random.default_rng([damage, int(position)]).integers(256))
        Image.new("L", (28, 28), 200).save(tmp_path / "a.jpg", exif=bytes(block), quality=95)
        assert np.abs(one(tmp_path / "a.jpg").astype(int) - 200).max() <= 3


def test_idx_files_of_any_size(tmp_path: Path, pixels) -> None:
    (tmp_path / "a").write_bytes(idx_bytes(pixels[:3]))
    (tmp_path / "b.gz").write_bytes(gzip.compress(idx_bytes(np.full((2, 5, 9), 77, np.uint8))))
    small = list(read_images(tmp_path / "a", Decoder(SHAPE, "pad")))
    assert [picture.name for picture in small] == [f"{tmp_path}/a[{i}]" for i in range(3)]
    assert (np.stack([picture.pixels[0] for picture in small]) == pixels[:3]).all()
    large = list(read_images(tmp_path / "b.gz", Decoder(SHAPE, "pad")))
    assert large[1].pixels[0, 14, 14] == 77


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not an image, or of an unknown format"),
        (b"hello", "is not an image, or of an unknown format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0", "is not an image, or of an unknown format"),
        (b"\0\0\x08\x01\0\0\0\x02\1\2", "contains an array of 1 dimensions"),
        (b"\0\0\x08\x04" + b"\0\0\0\1" * 4 + b"\7", "contains an array of 4 dimensions"),
        (b"\0\0\x08\x03\0\0\0\x02", "not an IDX file of unsigned bytes"),
        (b"\0\0\x08\x03" + b"\0\0\0\2" * 3 + b"\7", "instead of 8 for the declared shape 2x2x2"),
        (gzip.compress(b"hello", mtime=0), "not an IDX file"),
        (gzip.compress(b"hello" * 99, mtime=0)[:-9], "damaged gzip file"),
    ],
)
def test_unreadable_files(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(content)
    assert message in error(tmp_path / "a")


def test_truncated_and_too_large_images(
    tmp_path: Path, pixels, monkeypatch: pytest.MonkeyPatch
) -> None:
    for suffix in ("png", "jpg"):
        file = tmp_path / f"a.{suffix}"
        Image.fromarray(pixels[0]).resize((200, 200)).save(file)
        whole = file.read_bytes()
        for cut in (20, len(whole) // 2, len(whole) - 30):
            file.write_bytes(whole[:cut])
            assert error(file)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20_000)
    Image.new("1", (200, 250)).save(tmp_path / "bomb.png")
    assert "is too large: 50000 pixels" in error(tmp_path / "bomb.png")
    Image.new("1", (200, 150)).save(tmp_path / "large.png")
    assert one(tmp_path / "large.png").shape == SHAPE


def test_folders(tmp_path: Path) -> None:
    hidden = [".hidden.png", ".hidden/a.png"]
    for name in ("b.PNG", "a.jpeg", "sub/c.jpg", "x-images-idx3-ubyte.gz", "d.idx", *hidden):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    for name in ("notes.txt", "x-labels-idx1-ubyte.gz"):
        (tmp_path / name).write_bytes(b"")
    found = [str(file.relative_to(tmp_path)) for file in find_images(tmp_path)]
    assert found == ["a.jpeg", "b.PNG", "d.idx", "sub/c.jpg", "x-images-idx3-ubyte.gz"]


def test_network_with_two_channels(tmp_path: Path) -> None:
    Image.new("L", (28, 28)).save(tmp_path / "a.png")
    message = "is grey or colour, but the network expects 2 channels"
    assert error(tmp_path / "a.png", (2, 28, 28)) == message


def test_probabilities_are_those_of_the_network(run: Path, tmp_path: Path, pixels) -> None:
    (tmp_path / "some.idx").write_bytes(idx_bytes(pixels[:300]))
    found = list(predict(run, str(tmp_path / "some.idx"), top=4))
    images = FashionMNISTMini().normalised(torch.from_numpy(pixels[:300, None]))
    with torch.no_grad():
        shares = plain_network(run, "best", "model=shallow")(images).softmax(1)
    names = FashionMNISTMini.classes
    for prediction, row in zip(found, shares, strict=True):
        best = row.sort(descending=True)
        assert [p for _, p in prediction.classes] == pytest.approx(
            best.values[:4].tolist(), abs=1e-5
        )
        assert prediction.classes[0][0] == names[int(best.indices[0])]


def test_command(run: Path, tmp_path: Path, pixels) -> None:
    (tmp_path / "my, pictures").mkdir()
    Image.fromarray(pixels[0]).save(tmp_path / "my, pictures/one.png")
    Image.fromarray(pixels[2]).resize((333, 111)).save(tmp_path / "photo.jpg")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n")
    where = "hydra.run.dir=out"
    images = "images=photo.jpg,broken.png"
    done = command("predict", f"run={run}", images, "top=2", where, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "cnntrain: broken.png: is not an image, or of an unknown format",
        "cnntrain: 1 of 2 could not be read",
    ]
    head, line = done.stdout.splitlines()[:2]
    assert head.split("  ")[0] == "image"
    assert head.endswith(" one of 10 classes, the most probable first")
    assert line.startswith("photo.jpg  ")
    lines = [json.loads(line) for line in (tmp_path / "out/predictions.jsonl").open()]
    assert [line["image"] for line in lines] == ["photo.jpg", "broken.png"]
    assert len(lines[0]["predictions"]) == 2
    assert lines[1]["error"] == "is not an image, or of an unknown format"
    picture = Image.open(tmp_path / "out/predictions.png")
    assert min(picture.size) >= 84
    assert picture.getextrema() != (255, 255)
    for name in ("paper", "scan"):
        photo(pixels[1], 250, 20).save(tmp_path / f"my, pictures/{name}.jpg")
    done = command("predict", f"run={run}", "images=my, pictures", "json=true", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == (
        "cnntrain: 2 of 3 images have a light border, but the network was trained with light "
        "objects on a dark background: invert=true is probably missing\n"
    )
    line, paper, _ = map(json.loads, done.stdout.splitlines())
    assert [line["image"], paper["image"]] == ["my, pictures/one.png", "my, pictures/paper.jpg"]
    shares = [answer["probability"] for answer in line["predictions"]]
    assert shares == sorted(shares, reverse=True)
    assert len(list((run / "predict").iterdir())) == 1


def photo(pixels: np.ndarray, ground: int, ink: int, size: tuple[int, int] = (300, 300)) -> Any:
    """An object of brightness `ink` on a ground, with a gradient of light and a camera's noise."""
    object = Image.fromarray(pixels).resize((200, 200), Image.Resampling.BICUBIC)
    share = np.zeros((size[1], size[0]))
    top, left = (size[1] - 200) // 2, (size[0] - 200) // 2
    share[top : top + 200, left : left + 200] = np.asarray(object) / 255
    light = np.linspace(0.85, 1, size[0])[None]
    noise = np.random.default_rng(0).normal(0, 4, share.shape)
    grey = (ground + (ink - ground) * share) * light + noise
    colour = grey[..., None] * np.array([1, 0.95, 0.9])
    return Image.fromarray(colour.clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize(
    ("ground", "ink", "size", "light"),
    [
        (250, 20, (300, 300), True),
        (250, 20, (600, 220), True),  # the black added above and below is not the border
        (230, 140, (900, 900), True),  # small on paper
        (10, 240, (300, 300), False),
        (90, 250, (300, 300), False),
    ],
)
def test_light_border_is_detected(
    ground: int, ink: int, size: Any, light: bool, run: Path, tmp_path: Path, pixels, monkeypatch
) -> None:
    photo(pixels[0], ground, ink, size).save(tmp_path / "a.jpg", quality=80)
    (found,) = predict(run, str(tmp_path / "a.jpg"))
    assert found.light_border is light
    (inverted,) = predict(run, str(tmp_path / "a.jpg"), invert=True)
    assert not inverted.light_border
    monkeypatch.setattr(FashionMNISTMini, "mean", (0.4734,))  # as photographs, which get no hint
    monkeypatch.setattr(FashionMNISTMini, "std", (0.2516,))
    (found,) = predict(run, str(tmp_path / "a.jpg"))
    assert not found.light_border


def test_few_images_of_the_data_set_have_a_light_border(run: Path, pixels) -> None:
    found = predict(run, pixels[:300, None])
    assert sum(one.light_border for one in found) < 30


@pytest.mark.parametrize(
    ("shape", "size", "array", "tensor"),
    [
        ((9, 8), (8, 9), 1, 1),
        ((5, 9, 8), (8, 9), 5, 5),
        ((1, 9, 8), (8, 9), 1, 1),
        ((3, 9, 8), (8, 9), 0, 1),
        ((9, 8, 4), (8, 9), 1, 1),
        ((5, 3, 9, 8), (8, 9), 5, 5),
        ((3, 9, 8, 1), (8, 9), 3, 3),
        ((5, 9, 8, 4), (8, 9), 5, 5),
        ((5, 3, 8, 4), (4, 8), 5, 5),
        ((5, 2, 9, 8), (), 0, 0),
        ((1, 5, 1, 9, 8), (), 0, 0),
        ((9,), (), 0, 0),
    ],
)
def test_shapes_of_arrays(shape: tuple, size: tuple, array: int, tensor: int) -> None:
    values = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    for images, count in ((values, array), (torch.from_numpy(values), tensor)):
        if count:
            found = find_images(images)
            assert [image.size for _, image in found] == [size] * count
        else:
            with pytest.raises(ConfigError, match="C is 1, 3 or 4"):
                find_images(images)


def test_closed_pipe(run: Path, tmp_path: Path, pixels) -> None:
    (tmp_path / "some.idx").write_bytes(idx_bytes(pixels[:900]))
    line = f"{sys.executable} -m cnntrain predict run={run} images=some.idx json=true"
    line += " hydra.run.dir=out | head -2; exit ${PIPESTATUS[0]}"
    done = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 2
    assert len((tmp_path / "out/predictions.jsonl").read_text().splitlines()) == 900
    assert (tmp_path / "out/predictions.png").exists()


def test_invalid_options(run: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="empty: contains no image or IDX file"):
        predict(run, str(tmp_path / "empty"))
    for images in ([""], [str(tmp_path / "none.png")]):
        with pytest.raises(ConfigError, match="there is no such file"):
            predict(run, images)
    done = command("predict", f"run={run}", "images=empty", "top=0", "json=2", cwd=tmp_path)
    assert done.returncode == 2
    assert "top=0: input should be greater than 0" in done.stderr
