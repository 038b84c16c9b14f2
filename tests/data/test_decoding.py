"""Decoding of image files: NumPy, ImageOps and torchvision as oracles."""

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision.transforms import v2

from cnntrain.data.decoding import (
    Decoder,
    decoding_error,
    is_colour,
    median_size,
    no_warnings,
    open_image,
    oriented_size,
)

RNG = np.random.default_rng(0)
ORIENTATION = 0x0112


def noise(*shape: int, dtype: Any = np.uint8) -> np.ndarray:
    return RNG.integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)


def smooth(height: int, width: int) -> Image.Image:
    """A picture without high frequencies, which survives lossy compression."""
    y, x = np.mgrid[:height, :width] / 9
    planes = [np.sin(x), np.cos(y), np.sin(x + y)]
    return Image.fromarray((np.stack(planes, 2) * 100 + 128).astype(np.uint8))


def stored(image: Image.Image, kind: str = "PNG", **options: Any) -> io.BytesIO:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    stream.seek(0)
    return stream


def read(image: Image.Image, kind: str = "PNG", channels: int = 3, **options: Any) -> np.ndarray:
    """The image stored and decoded in its own size: (H, W) or (C, H, W)."""
    decoder = Decoder((channels, image.height, image.width), background=200)
    pixels = decoder.read(stored(image, kind, **options))
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    return pixels[0] if channels == 1 else pixels


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "WEBP"])
def test_lossless_formats(kind: str) -> None:
    pixels = noise(6, 9, 3)
    options = {"lossless": True} if kind == "WEBP" else {}
    assert (read(Image.fromarray(pixels), kind, **options) == pixels.transpose(2, 0, 1)).all()


@pytest.mark.parametrize("mode", ["RGB", "CMYK", "L"])
def test_jpeg(mode: str) -> None:
    image = smooth(24, 40)
    expected = np.asarray(image.convert(mode).convert("RGB")).transpose(2, 0, 1)
    found = read(image.convert(mode), "JPEG", quality=95)
    assert abs(found.astype(int) - expected).mean() < 2


@pytest.mark.parametrize(("kind", "mode"), [("PNG", "I;16"), ("TIFF", "I;16"), ("PPM", "I;16")])
def test_16_bits_become_the_upper_8(kind: str, mode: str) -> None:
    values = noise(5, 7, dtype=np.uint16)
    values[0, :4] = 0, 255, 256, 65535
    image = Image.fromarray(values)
    assert image.mode == mode
    assert (read(image, kind, 1) == values // 256).all()
    assert (read(image, kind, 3) == values // 256).all()


def test_transparent_grey_of_16_bits() -> None:
    values = noise(4, 4, dtype=np.uint16)
    values[1, 2] = values[3, 0] = 4660
    expected = np.where(values == 4660, 200, values // 256)
    assert (read(Image.fromarray(values), "PNG", 1, transparency=4660) == expected).all()


@pytest.mark.parametrize("mode", ["I", "F"])
def test_unknown_range_is_an_error(mode: str) -> None:
    image = Image.fromarray(np.zeros((4, 4), np.int32 if mode == "I" else np.float32))
    with pytest.raises(ValueError, match="pixels; convert it to 8 or 16 bits"):
        read(image, "TIFF")


def test_alpha_is_blended_with_the_background() -> None:
    pixels = noise(6, 8, 4)
    alpha = pixels[..., 3:] / 255
    expected = pixels[..., :3] * alpha + 200 * (1 - alpha)
    found = read(Image.fromarray(pixels)).transpose(1, 2, 0)
    assert abs(found - expected).max() <= 1
    grey = noise(6, 8, 2)
    expected = (grey[..., 0] * (grey[..., 1] / 255) + 200 * (1 - grey[..., 1] / 255))[None]
    assert abs(read(Image.fromarray(grey), channels=1) - expected).max() <= 1


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_palette(kind: str) -> None:
    indices = noise(6, 8) % 4
    palette = noise(4, 3)
    image = Image.fromarray(indices)
    image.putpalette(palette.tobytes())
    expected = palette[indices].transpose(2, 0, 1)
    assert (read(image, kind) == expected).all()
    expected = np.where(indices == 2, 200, expected)
    assert (read(image, kind, transparency=2) == expected).all()


def test_first_frame_of_an_animation_and_first_page() -> None:
    frames = [Image.new("RGB", (5, 4), colour) for colour in ("red", "lime", "blue")]
    for kind in ("GIF", "TIFF", "WEBP", "PNG"):
        options = {"save_all": True, "append_images": frames[1:]}
        options |= {"lossless": True} if kind == "WEBP" else {}
        found = read(frames[0], kind, **options)
        assert (found == np.array([255, 0, 0])[:, None, None]).all(), kind


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", [1, 2, 3, 4, 5, 6, 7, 8])
def test_exif_orientation(kind: str, orientation: int) -> None:
    image, exif = smooth(16, 24), Image.Exif()
    exif[ORIENTATION] = orientation
    file = stored(image, kind, exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(file)).convert("RGB"))
    file.seek(0)
    with open_image(file) as opened:
        assert oriented_size(opened) == expected.shape[:2]
    file.seek(0)
    found = Decoder((3, *expected.shape[:2])).read(file)
    assert (found == expected.transpose(2, 0, 1)).all()


def test_damaged_exif_is_ignored() -> None:
    image = smooth(8, 8)
    with no_warnings():
        assert read(image, "JPEG", exif=b"Exif\0\0MM\0*" + bytes(range(40))).shape == (3, 8, 8)


# Sizes for which torchvision's rounding of the longer side and of the margin is exact.
@pytest.mark.parametrize("size", [(48, 96), (96, 32), (64, 64), (20, 30), (12, 8)])
def test_crop_equals_torchvision(size: tuple[int, int]) -> None:
    pixels = noise(*size, 3)
    file = stored(Image.fromarray(pixels))
    found = Decoder((3, 16, 16)).read(file).astype(int)
    resize = v2.Compose([v2.Resize(16, antialias=True), v2.CenterCrop(16)])
    expected = resize(torch.from_numpy(pixels).permute(2, 0, 1)).numpy()
    assert abs(found - expected).max() <= 1


def test_stretch_and_pad() -> None:
    pixels = noise(30, 60, 3)
    image, tensor = Image.fromarray(pixels), torch.from_numpy(pixels).permute(2, 0, 1)
    found = Decoder((3, 20, 24), "stretch")(image).astype(int)
    assert abs(found - v2.Resize((20, 24), antialias=True)(tensor).numpy()).max() <= 1
    found = Decoder((3, 20, 24), "pad", background=77)(image).astype(int)
    assert (found[:, [*range(4), *range(16, 20)]] == 77).all()
    expected = v2.Resize((12, 24), antialias=True)(tensor).numpy()
    assert abs(found[:, 4:16] - expected).max() <= 1


@pytest.mark.parametrize("resize", ["crop", "pad", "stretch"])
@pytest.mark.parametrize("size", [(100_000, 1), (1, 100_000), (1, 1), (3, 2), (7, 1000)])
def test_extreme_sizes(resize: Any, size: tuple[int, int]) -> None:
    file = stored(Image.new("RGB", size, (10, 20, 30)))
    found = Decoder((3, 16, 24), resize, background=0).read(file)
    assert found.shape == (3, 16, 24)
    assert (found[:, 8, 12] == [10, 20, 30]).all() or resize == "pad"


def test_reducing_changes_large_images_only() -> None:
    for size, exact in ((95, True), (640, False)):
        image = smooth(size, size)
        decoded = Image.open(stored(image, "JPEG", quality=95))
        plain = np.asarray(decoded.resize((16, 16), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
        found = Decoder((3, 16, 16)).read(stored(image, "JPEG", quality=95))
        assert (found == plain).all() == exact
        assert abs(found.astype(int) - plain).mean() < 3


def test_grey_and_invert() -> None:
    pixels = noise(6, 8, 3)
    weighted = pixels @ [0.299, 0.587, 0.114]
    assert abs(read(Image.fromarray(pixels), channels=1) - weighted).max() <= 1
    transparent = Image.fromarray(np.dstack([pixels, np.zeros((6, 8), np.uint8)]))
    decoder = Decoder((1, 6, 8), background=200, invert=True)
    assert (decoder(transparent) == 200).all()
    assert abs(decoder(Image.fromarray(pixels))[0] - (255 - weighted)).max() <= 1


def test_colour_by_the_header() -> None:
    grey_palette, palette = (Image.new("P", (2, 2)) for _ in range(2))
    grey_palette.putpalette([0, 0, 0, 9, 9, 9])
    palette.putpalette([0, 0, 0, 9, 9, 8])
    for image, colour in ((grey_palette, False), (palette, True)):
        with open_image(stored(image)) as opened:
            assert is_colour(opened) == colour
    for mode, colour in {"1": False, "L": False, "LA": False, "I;16": False, "RGBA": True}.items():
        with open_image(stored(Image.new(mode, (2, 2)))) as opened:
            assert is_colour(opened) == colour


def reason(file: Path) -> str:
    with no_warnings():
        try:
            Decoder((3, 8, 8)).read(file)
        except Exception as error:
            return decoding_error(error, "name")
    return "is decoded"


def test_reasons(tmp_path: Path) -> None:
    good = stored(smooth(50, 50), "JPEG").getvalue()
    bomb = stored(Image.new("1", (20_000, 20_000))).getvalue()
    contents = {
        b"": "is not an image, or of an unknown format",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n": "is not an image",
        good[: len(good) // 2]: "truncated",
        bomb: "is too large: 400000000",
    }
    for content, text in contents.items():
        (tmp_path / "x.jpg").write_bytes(content)
        assert text in reason(tmp_path / "x.jpg").replace("Truncated", "truncated")
    assert reason(tmp_path / "none.jpg") == "No such file or directory"
    assert reason(tmp_path) == "is not a regular file"
    (tmp_path / "broken.jpg").symlink_to("none")
    assert reason(tmp_path / "broken.jpg") == "No such file or directory"
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    assert reason(tmp_path / "loop.jpg") == "Too many levels of symbolic links"
    (tmp_path / "zero.jpg").symlink_to("/dev/zero")
    assert reason(tmp_path / "zero.jpg") == "is not a regular file"
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.jpg")
        assert reason(tmp_path / "pipe.jpg") == "is not a regular file"


def test_files_are_closed(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.png", tmp_path / "bad.png"
    smooth(9, 9).save(good)
    bad.write_bytes(good.read_bytes()[:100])
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    Decoder((3, 9, 9)).read(good)
    reason(bad)
    assert before in (0, len(os.listdir("/proc/self/fd")))


def test_median_size() -> None:
    assert median_size([(40, 50)] * 3) == (40, 50)
    assert median_size([(300, 300)] * 3) == (128, 128)
    assert median_size([(40, 50), (90, 70), (66, 200)]) == (64, 64)
    assert median_size([(5, 9), (9, 5)]) == (32, 32)
