"""Random crop, flip and erasing of a whole batch at once, each sample with parameters of its own.

What is random (`draw`) stands apart from what is done (`apply`): the parameters of a whole epoch
are integers drawn on the CPU, so the same generator gives the same pixels on every device.
"""

from __future__ import annotations

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
        hflip: Probability of a left-right flip.
        crop: Pixels of black added on each side before a window of the image's size is cut out,
            every position alike; 0 is off.
        erase: Probability that a rectangle is made black: 2 to 33 % of the image, height over
            width log-uniform in 0.3 to 3.3, every position alike (Zhong et al. 2017,
            "Random Erasing Data Augmentation", with torchvision's RandomErasing's numbers).
    """

    hflip: float = 0.0
    crop: int = 0
    erase: float = 0.0

    def __bool__(self) -> bool:
        """Whether anything is on."""
        return self.hflip > 0 or self.crop > 0 or self.erase > 0

    def draw(self, n: int, height: int, width: int, generator: torch.Generator) -> Tensor:
        """Draws the parameters of `n` samples of `height` x `width` pixels from a CPU generator.

        Returns:
            int64 (7, n): flip (0 or 1), row and column of the crop's window in the padded image
            (0 to 2 * crop), and the erased rectangle's top, left, height and width (0: none).
        """
        float64 = torch.float64
        u = torch.rand(3, n, generator=generator, dtype=float64)
        flip = u[0] < self.hflip
        window = (u[1:] * (2 * self.crop + 1)).long()  # (2, n)
        # Erasing draws last, so that switching it leaves crop and flip as they are.
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
        """Augments a batch.

        Args:
            images: (B, C, H, W) of any type in which 0 is black; not changed.
            parameters: int64 (7, B) from `draw`, on the images' device.

        Returns:
            The new batch: same shape, type and device.
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

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """`draw` and `apply` for one batch (B, C, H, W)."""
        count, _, height, width = images.shape
        return self.apply(images, self.draw(count, height, width, generator).to(images.device))


def _windows(images: Tensor, padding: int, row: Tensor, column: Tensor) -> Tensor:
    """Each sample's window of the original size, at (row, column) of the padded image."""
    _, c, h, w = images.shape
    padded = F.pad(images, (padding, padding, padding, padding))  # (B, C, H + 2p, W + 2p)
    # Every pixel starts a (C, H, W) window of this view, so one index_select over whole windows
    # does the work: several times faster than gathering pixel by pixel.
    sample, channel, line, _ = padded.stride()
    reach = (c - 1) * channel + (h - 1) * line + w - 1
    windows = padded.as_strided((padded.numel() - reach, c, h, w), (1, channel, line, 1))
    start = torch.arange(len(images), device=images.device) * sample + row * line + column
    return windows.index_select(0, start)


def _outside(start: Tensor, length: Tensor, size: int) -> Tensor:
    """uint8 (B, size): 0 where start <= position < start + length, 1 elsewhere."""
    position = torch.arange(size, device=start.device)
    start, length = start[:, None], length[:, None]
    # uint8 because PyTorch's CPU kernels broadcast bool several times slower.
    return ((position < start) | (position >= start + length)).to(torch.uint8)
