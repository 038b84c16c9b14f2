"""What the backends are measured against beside PyTorch's own: other ways that people know."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import unfold

from cnntrain.conv import Geometry
from cnntrain.conv.geometry import pad, padding_amounts
from cnntrain.conv.oracle import seven_loops


class UnfoldConv2d(nn.Conv2d):
    """The layer of many tutorials: F.unfold, a matrix product, and autograd's own F.fold behind.

    Padding must be given in pixels, and be of zeros: all that F.unfold can do. RuntimeError else.
    """

    unfold = staticmethod(unfold)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if isinstance(self.padding, str) or self.padding_mode != "zeros":
            raise RuntimeError("unfolding pads with zeros only, and by a number of pixels")
        how = {"dilation": self.dilation, "padding": self.padding, "stride": self.stride}
        columns = self.unfold(input, self.kernel_size, **how)  # (N, C * kh * kw, OH * OW)
        columns = columns.unflatten(1, (self.groups, -1))  # (N, groups, K, OH * OW)
        filters = weight.view(self.groups, -1, columns.shape[2])  # (groups, O/groups, K)
        y = (filters @ columns).flatten(1, 2)  # (N, O, OH * OW)
        if bias is not None:
            y = y + bias.view(-1, 1)
        reach = [d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel_size, strict=True)]
        oh = (input.shape[2] + 2 * int(self.padding[0]) - reach[0]) // self.stride[0] + 1
        return y.unflatten(2, (oh, -1))  # (N, O, OH, OW)


class UnfoldNdConv2d(UnfoldConv2d):
    """The same with `unfoldNd.unfoldNd`, which unfolds by a convolution with one-hot filters.

    Needs the package: `pip install unfoldNd`. Source: https://github.com/f-dangel/unfoldNd
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        from unfoldNd import unfoldNd

        self.unfold = unfoldNd


class SevenLoopsConv2d(nn.Conv2d):
    """The definition in pure Python. Its output has no gradient."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        geometry = Geometry.of(self)
        amounts = padding_amounts(self.padding, self.kernel_size, geometry.dilation)
        padded = pad(input, amounts, self.padding_mode)
        with torch.no_grad():
            y = seven_loops(padded, weight, bias, geometry)
        return torch.tensor(y, dtype=input.dtype, device=input.device)


PEERS = {"unfold": UnfoldConv2d, "unfoldNd": UnfoldNdConv2d, "seven_loops": SevenLoopsConv2d}
