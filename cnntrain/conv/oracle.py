"""The definition of a convolution, loop by loop. Only to check the others: it takes minutes for
what they do in milliseconds."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from cnntrain.conv.geometry import Geometry, Pair


def seven_loops(
    x: Tensor, w: Tensor, bias: Tensor | None = None, geometry: Geometry | None = None
) -> list:
    """The convolution of x (N, C, H, W), already padded, with w (O, C/groups, kh, kw).

    Computed in plain Python numbers, that is float64. Returns nested lists [N][O][OH][OW].
    """
    how = geometry or Geometry()
    (sh, sw), (dh, dw) = how.stride, how.dilation
    size: Pair = (x.shape[2], x.shape[3])
    out_rows, out_columns = how.output_size(size, (w.shape[2], w.shape[3]))
    batch, (out_channels, in_channels, kernel_rows, kernel_columns) = x.shape[0], w.shape
    filters_per_group = out_channels // how.groups
    image: Sequence = x.tolist()
    weight: Sequence = w.tolist()
    y = [
        [[[0.0] * out_columns for _ in range(out_rows)] for _ in range(out_channels)]
        for _ in range(batch)
    ]
    for n in range(batch):
        for o in range(out_channels):
            first = (
                o // filters_per_group * in_channels
            )  # channel that the filter's group starts at
            for r in range(out_rows):
                for q in range(out_columns):
                    total = 0.0 if bias is None else bias[o].item()
                    for c in range(in_channels):
                        for i in range(kernel_rows):
                            for j in range(kernel_columns):
                                pixel = image[n][first + c][r * sh + i * dh][q * sw + j * dw]
                                total += weight[o][c][i][j] * pixel
                    y[n][o][r][q] = total
    return y
