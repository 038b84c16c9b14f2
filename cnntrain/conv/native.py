"""PyTorch's own convolution: oneDNN on CPU, cuDNN on GPU. What the others are measured against."""

from __future__ import annotations

from torch import nn


class NativeConv2d(nn.Conv2d):
    """``nn.Conv2d`` itself, under the name that a config chooses it by."""

    exact_on_integers = False  # on a GPU: Fourier's and Winograd's algorithms are cuDNN's to choose
    spreads_non_finite = True  # as those do within an image
