"""Augmentation of a batch: random crop, horizontal flip and random erasing.

Each sample has its own parameters. They are integers, drawn on the CPU for a whole epoch (`draw`)
and applied on any device (`apply`): a generator gives the same pixels on every device.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

ERASE_AREA = (0.02, 0.33)  # of the image
ERASE_RATIO = (0.3, 3.3)  # height over width
ERASE_ATTEMPTS = 10


@dataclass(frozen=True)
class Augment:
    """Random crop, horizontal flip and erasing, in this order, per sample.

    Args:
        hflip: Probability of a horizontal flip.
        crop: Pixels of black padding on each side before a crop of the image's size at a uniform
            position; 0: no crop.
        erase: Probability that a rectangle at a uniform position becomes black: 2 to 33 % of the
            image, height over width log-uniform in 0.3 to 3.3. Source: Zhong et al. 2017,
            arXiv:1708.04896, with the constants of torchvision's RandomErasing.
    """

    hflip: float = 0.0
    crop: int = 0
    erase: float = 0.0

    def __bool__(self) -> bool:
        """Whether anything is on."""
        return self.hflip > 0 or self.crop > 0 or self.erase > 0

    def draw(self, n: int, height: int, width: int, generator: torch.Generator) -> Tensor:
        """Draw the parameters of `n` samples of `height` x `width` pixels from a CPU generator.

        Returns:
            int64 (7, n): flip (0 or 1); row and column of the crop in the padded image (0 to
            2 * crop); top, left, height and width of the erased rectangle (0: none).
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
        return torch.cat([flip.long()[None], window, rectangle])

    def apply(self, images: Tensor, parameters: Tensor) -> Tensor:
        """Augment a batch.

        Args:
            images: (B, C, H, W) of any dtype in which 0 is black; not modified.
            parameters: int64 (7, B) from `draw`, on the device of the images.

        Returns:
            A new batch of the same shape, dtype and device.
        """
        flip, row, column, top, left, height, width = parameters  # (B,) each
        if self.crop > 0:
            images = _windows(images, self.crop, row, column)
        if self.hflip > 0:
            images = torch.where(flip.bool()[:, None, None, None], images.flip(-1), images)
        if self.erase > 0:
            rows = _outside(top, height, images.shape[-2])  # (B, H)
            columns = _outside(left, width, images.shape[-1])  # (B, W)
            keep = rows[:, :, None] | columns[:, None, :]  # (B, H, W)
            images = images * keep[:, None]
        return images


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


def _outside(start: Tensor, length: Tensor, size: int) -> Tensor:
    """uint8 (B, size): 0 where start <= position < start + length, 1 elsewhere."""
    position = torch.arange(size, device=start.device)
    start, length = start[:, None], length[:, None]
    # uint8: PyTorch's CPU kernels broadcast bool several times slower.
    return ((position < start) | (position >= start + length)).to(torch.uint8)
