"""Reference implementation of the convolution: the nested loops of its definition, in Python."""

from __future__ import annotations

from itertools import product

from torch import Tensor

from cnntrain.conv.geometry import Geometry


def conv2d_reference(
    x: Tensor, w: Tensor, bias: Tensor | None = None, geometry: Geometry | None = None
) -> list:
    """The convolution in float64, one multiplication at a time. Slow: for checks only.

    Args:
        x: input (N, C, H, W), already padded.
        w: weight (O, C/groups, kh, kw).
        bias: (O,), or None.
        geometry: stride, dilation and groups; default 1, 1 and 1.

    Returns:
        The output as nested lists [N][O][OH][OW].
    """
    geometry = geometry or Geometry()
    (sh, sw), (dh, dw) = geometry.stride, geometry.dilation
    out_rows, out_columns = geometry.output_size(x.shape[2:], w.shape[2:])
    batch, (out_channels, in_channels, kernel_rows, kernel_columns) = x.shape[0], w.shape
    filters_per_group = out_channels // geometry.groups
    image, weight = x.tolist(), w.tolist()
    y = [
        [[[0.0] * out_columns for _ in range(out_rows)] for _ in range(out_channels)]
        for _ in range(batch)
    ]
    for n, o in product(range(batch), range(out_channels)):
        first = o // filters_per_group * in_channels  # input channel that the group starts at
        for r, q in product(range(out_rows), range(out_columns)):
            total = 0.0 if bias is None else bias[o].item()
            for c in range(in_channels):
                for i in range(kernel_rows):
                    for j in range(kernel_columns):
                        pixel = image[n][first + c][r * sh + i * dh][q * sw + j * dw]
                        total += weight[o][c][i][j] * pixel
            y[n][o][r][q] = total
    return y
