"""Augmentation: flips, crops, erasing, torchvision's transforms, mixup and CutMix.

Each sample has its own parameters, drawn on the CPU (a generator gives the same on every device):

- crop, flips and erasing: integers for a whole epoch (`draw`), applied to a batch at once (`apply`)
  with the same pixels on every device;
- torchvision's transforms: a seed and a call per image (`transformed`), with the cost that
  docs/configuration.md states: 0.4 to 4 ms per image and transform on one core;
- mixup and CutMix: a weight and a rectangle for a whole epoch (`draw_mixing`), applied to a
  normalised batch (`mix`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat
from torch import Tensor, nn
from torchvision.transforms import v2

ERASE_AREA = (0.02, 0.33)  # of the image
ERASE_RATIO = (0.3, 3.3)  # height over width
ERASE_ATTEMPTS = 10

Probability = Annotated[float, Field(ge=0, le=1)]
Strength = Annotated[float, Field(ge=0, le=2)]
Hue = Annotated[float, Field(ge=0, le=0.5)]


@dataclass(frozen=True)
class Augment:
    """Augmentation of training images, in this order: random_resized_crop, rotation to shear,
    trivial_augment, color_jitter, crop, flips, erase, then mixup or CutMix. Off by default.

    Args:
        hflip: Probability of a horizontal flip.
        crop: Pixels of black padding on each side before a crop of the image's size at a uniform
            position; 0: no crop.
        erase: Probability that a rectangle at a uniform position becomes black: 2 to 33 % of the
            image, height over width log-uniform in 0.3 to 3.3. Source: Zhong et al. 2017,
            arXiv:1708.04896, with the constants of torchvision's RandomErasing.
        vflip: Probability of a vertical flip.
        random_resized_crop: Smallest share of the area in a crop of 3:4 to 4:3, which is resized to
            the size of the image, such as 0.08 (ImageNet) or 0.35; 0: no such crop.
        rotate: Largest angle in degrees. Pixels from outside of the image are black.
        translate: Largest shift, as a share of each side.
        scale: Smallest and largest factor of the size.
        shear: Largest angle in degrees, horizontally.
        color_jitter: Strength s of changes in brightness, contrast, saturation (each s) and hue
            (s / 4), as in SimCLR (Chen et al. 2020, arXiv:2002.05709); or the four values.
        trivial_augment: One operation of random strength per image: TrivialAugmentWide (Müller and
            Hutter 2021, arXiv:2103.10158).
        mixup: alpha of Beta(alpha, alpha), the distribution of the weights with which images and
            labels are averaged with another image's, such as 0.2; 0: off. Source: Zhang et al.
            2017, arXiv:1710.09412.
        cutmix: The same for a rectangle pasted from another image, such as 1.0. Source: Yun et al.
            2019, arXiv:1905.04899. With mixup too, each batch gets one of them, at equal odds.

    Raises:
        ValueError: The smallest `scale` exceeds the largest.
    """

    hflip: Probability = 0.0
    crop: NonNegativeInt = 0
    erase: Probability = 0.0
    vflip: Probability = 0.0
    random_resized_crop: Probability = 0.0
    rotate: Annotated[float, Field(ge=0, le=180)] = 0.0
    translate: Probability = 0.0
    scale: tuple[PositiveFloat, PositiveFloat] = (1.0, 1.0)
    shear: Annotated[float, Field(ge=0, lt=90)] = 0.0
    color_jitter: Strength | tuple[Strength, Strength, Strength, Hue] = 0.0
    trivial_augment: bool = False
    mixup: NonNegativeFloat = 0.0
    cutmix: NonNegativeFloat = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale", tuple(self.scale))  # a config has lists
        if self.scale[0] > self.scale[1]:
            raise ValueError(f"data.scale={list(self.scale)}: give the smallest factor first")

    def __bool__(self) -> bool:
        """Whether anything is on."""
        return self != Augment()

    @property
    def mixes(self) -> bool:
        """Whether labels become probabilities."""
        return self.mixup > 0 or self.cutmix > 0

    def flips(self) -> "Augment":
        """Flips only."""
        return Augment(hflip=self.hflip, vflip=self.vflip)

    def transforms(self, height: int, width: int) -> list[nn.Module]:
        """Those of torchvision, for images (C, H, W) of this size."""
        bilinear, found = v2.InterpolationMode.BILINEAR, list[nn.Module]()
        if area := self.random_resized_crop:
            found.append(v2.RandomResizedCrop((height, width), scale=(area, 1.0)))
        if self.rotate or self.translate or self.shear or self.scale != (1, 1):
            shift = self.translate, self.translate
            affine = self.rotate, shift, self.scale, self.shear
            found.append(v2.RandomAffine(*affine, interpolation=bilinear))
        if self.trivial_augment:
            found.append(v2.TrivialAugmentWide(interpolation=bilinear))
        if jitter := self.color_jitter:
            each = (*[jitter] * 3, jitter / 4) if isinstance(jitter, (int, float)) else jitter
            found.append(v2.ColorJitter(*each))
        return found

    def draw(self, n: int, height: int, width: int, generator: torch.Generator) -> Tensor:
        """Draw the parameters of `n` samples of `height` x `width` pixels from a CPU generator.

        Returns:
            int64 (8, n): horizontal flip (0 or 1); row and column of the crop in the padded image
            (0 to 2 * crop); top, left, height and width of the erased rectangle (0: none);
            vertical flip.
        """
        float64 = torch.float64
        u = torch.rand(3, n, generator=generator, dtype=float64)
        flip = u[0] < self.hflip
        window = (u[1:] * (2 * self.crop + 1)).long()  # (2, n)
        # Drawn last, so that `erase` does not change crop and flip.
        rectangle = torch.zeros(4, n, dtype=torch.int64)
        if self.erase > 0:
            u = torch.rand(3 + 2 * ERASE_ATTEMPTS, n, generator=generator, dtype=float64)
            sizes, ratios = u[3:].chunk(2)  # (attempts, n) each
            low, high = ERASE_AREA
            area = (low + (high - low) * sizes) * (height * width)
            low, high = math.log(ERASE_RATIO[0]), math.log(ERASE_RATIO[1])
            ratio = torch.exp(low + (high - low) * ratios)
            h, w = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
            fits = (h < height) & (w < width)
            first = fits.int().argmax(0, keepdim=True)  # the first attempt that fits
            erased = (u[0] < self.erase) & fits.any(0)
            h, w = h.gather(0, first)[0], w.gather(0, first)[0]  # (n,)
            top, left = (u[1] * (height - h + 1)).floor(), (u[2] * (width - w + 1)).floor()
            rectangle = (torch.stack([top, left, h, w]) * erased).long()
        vflip = torch.zeros(n, dtype=torch.bool)
        if self.vflip > 0:
            vflip = torch.rand(n, generator=generator, dtype=float64) < self.vflip
        return torch.cat([flip.long()[None], window, rectangle, vflip.long()[None]])

    def apply(self, images: Tensor, parameters: Tensor) -> Tensor:
        """Augment a batch.

        Args:
            images: (B, C, H, W) of any dtype in which 0 is black; not modified.
            parameters: int64 (8, B) from `draw`, on the device of the images.

        Returns:
            A new batch of the same shape, dtype and device.
        """
        flip, row, column, top, left, height, width, vflip = parameters  # (B,) each
        if self.crop > 0:
            images = _windows(images, self.crop, row, column)
        if self.hflip > 0:
            images = torch.where(flip.bool()[:, None, None, None], images.flip(-1), images)
        if self.vflip > 0:
            images = torch.where(vflip.bool()[:, None, None, None], images.flip(-2), images)
        if self.erase > 0:
            images = images * _outside(images, top, left, height, width)
        return images

    def draw_mixing(
        self, n: int, batch_size: int, height: int, width: int, generator: np.random.Generator
    ) -> Tensor:
        """Draw the parameters of mixup or CutMix of `n` samples, in batches of `batch_size`.

        Returns:
            float32 (5, n): weight of the sample inside of a rectangle, which is the whole image for
            mixup; top, left, height and width of the rectangle.
        """
        ratio = 0.5 if self.mixup and self.cutmix else float(self.cutmix > 0)
        cut = generator.random(-(-n // batch_size)) < ratio  # of each batch
        cut = cut.repeat(batch_size)[:n]
        size = np.array([[height], [width]])
        centre = np.floor(generator.random((2, n)) * size)
        alpha = np.where(cut, self.cutmix or 1.0, self.mixup or 1.0)
        weight = generator.beta(alpha, alpha)
        # As v2.CutMix: what exceeds the image is cut off.
        half = np.where(cut, np.floor(0.5 * np.sqrt(1 - weight) * size), np.inf)
        start, end = np.maximum(centre - half, 0), np.minimum(centre + half, size)
        drawn = np.stack([np.where(cut, 0.0, weight), *start, *(end - start)])
        return torch.from_numpy(drawn.astype(np.float32))


def transformed(images: Tensor, transforms: Sequence[nn.Module], seeds: Tensor) -> Tensor:
    """Transform each image (C, H, W) of a batch, with PyTorch's CPU generator seeded by its own of
    the `seeds` (B,), and restored afterwards. On CUDA some transforms synchronise.
    """
    found = []
    with torch.random.fork_rng(devices=[]):
        for image, seed in zip(images, seeds.tolist(), strict=True):
            torch.default_generator.manual_seed(seed)
            for transform in transforms:
                image = transform(image)
            found.append(image)
    return torch.stack(found) if found else images


def mix(images: Tensor, labels: Tensor, parameters: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Mix each sample with the one before it, the first with the last, as v2.MixUp and v2.CutMix.

    Args:
        images: float32 (B, C, H, W).
        labels: int64 (B,).
        parameters: float32 (5, B) from `Augment.draw_mixing`, on the device of the images.
        classes: Number of classes.

    Returns:
        The mixed images, and the probability of each class, float32 (B, classes).
    """
    weight, top, left, height, width = parameters
    outside = _outside(images, top, left, height, width)  # (B, 1, H, W)
    weights = torch.where(outside.bool(), 1.0, weight[:, None, None, None])
    area = height * width / images.shape[2:].numel()
    share = torch.where(weight > 0, weight, 1 - area)[:, None]  # mixup, CutMix
    target = F.one_hot(labels, classes).to(images.dtype)
    # lerp is exact where the weight is 0 or 1.
    return images.roll(1, 0).lerp(images, weights), target.roll(1, 0).lerp(target, share)


def _windows(images: Tensor, padding: int, row: Tensor, column: Tensor) -> Tensor:
    """Crop of each sample at (row, column) of the padded image."""
    _, c, h, w = images.shape
    padded = F.pad(images, (padding, padding, padding, padding))  # (B, C, H + 2p, W + 2p)
    # A view with one (C, H, W) window per start pixel: one index_select of windows is several times
    # faster than gathering pixels.
    sample, channel, line, _ = padded.stride()
    extent = (c - 1) * channel + (h - 1) * line + w - 1
    windows = padded.as_strided((padded.numel() - extent, c, h, w), (1, channel, line, 1))
    start = torch.arange(len(images), device=images.device) * sample + row * line + column
    return windows.index_select(0, start)


def _outside(images: Tensor, top: Tensor, left: Tensor, height: Tensor, width: Tensor) -> Tensor:
    """uint8 (B, 1, H, W): 0 in a rectangle of each image, 1 elsewhere."""
    parts = []
    for start, length, size in zip((top, left), (height, width), images.shape[2:], strict=True):
        position = torch.arange(size, device=images.device)
        start, end = start[:, None], (start + length)[:, None]
        # uint8: PyTorch's CPU kernels broadcast bool several times slower.
        parts.append(((position < start) | (position >= end)).to(torch.uint8))
    return (parts[0][:, :, None] | parts[1][:, None, :])[:, None]
