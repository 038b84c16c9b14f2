"""Interface of a convolution algorithm: the three functions that define it."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from cnntrain.conv.geometry import Amounts, Geometry, Pair, crop, pad, padded

ACCUMULATION_DTYPES = {
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
    torch.complex32: torch.complex64,
}


def upcast(t: Tensor) -> Tensor:
    """t in the dtype of its sums of products: float32 for half types, else its own."""
    return t.to(ACCUMULATION_DTYPES.get(t.dtype, t.dtype))


class Algorithm(ABC):
    """A way to compute a convolution, its input gradient and its weight gradient.

    Shapes: x (N, C, H, W), already padded; w (O, C/groups, kh, kw); g, y (N, O, OH, OW). Sizes,
    dtypes and devices are checked by the caller; inputs may have any strides and must not be
    changed. Results are new tensors of the inputs' dtype, which is never a half type. None of the
    three functions needs to be differentiable.
    """

    @abstractmethod
    def forward(self, x: Tensor, w: Tensor, geometry: Geometry) -> Tensor:
        """y (N, O, OH, OW), without bias."""

    @abstractmethod
    def grad_input(self, g: Tensor, w: Tensor, input_size: Pair, geometry: Geometry) -> Tensor:
        """dx (N, C, H, W), where input_size is (H, W)."""

    @abstractmethod
    def grad_weight(self, g: Tensor, x: Tensor, kernel_size: Pair, geometry: Geometry) -> Tensor:
        """dw (O, C/groups, kh, kw), where kernel_size is (kh, kw)."""

    # The same for an unpadded input. An algorithm that computes the batch in parts may override
    # them, to pad one part at a time. Half types are computed in float32 and rounded once.

    def padded_forward(
        self, x: Tensor, w: Tensor, bias: Tensor | None, geometry: Geometry, zeros: Amounts
    ) -> Tensor:
        y = self.forward(pad(upcast(x), zeros), upcast(w), geometry)
        return (y if bias is None else y + bias[:, None, None]).to(x.dtype)

    def padded_grad_input(
        self, g: Tensor, w: Tensor, input_size: Pair, geometry: Geometry, zeros: Amounts
    ) -> Tensor:
        dx = self.grad_input(upcast(g), upcast(w), padded(input_size, zeros), geometry)
        return (crop(dx, zeros).clone() if any(zeros) else dx).to(g.dtype)

    def padded_grad_weight(
        self, g: Tensor, x: Tensor, kernel_size: Pair, geometry: Geometry, zeros: Amounts
    ) -> Tensor:
        dw = self.grad_weight(upcast(g), pad(upcast(x), zeros), kernel_size, geometry)
        return dw.to(g.dtype)

    def traceable(self) -> Algorithm:
        """An equal algorithm for compilation, export and tensor subclasses, whose operators do not
        depend on sizes."""
        return self
