"""How im2col's matrices lie in memory. Nothing here multiplies; all of it is for speed.

Copying windows into columns takes longer than multiplying them. Two things make it cheap:

- Windows one below the other share all but one of their rows. So only the width is unrolled,
  kh times less to write, and the columns of an output row are a view: OH column matrices that
  overlap in memory. Source: M. Cho, D. Brand, "MEC: Memory-efficient Convolution for Deep Neural
  Network", ICML 2017.
- The batch is the innermost dimension, so all that is copied or added are long contiguous runs.

`wide` is the input unrolled along its width: (groups, H, C/groups * kw, OW * N), where
wide[., y, (c, j), (ox, n)] = x[n, c, y, sw ox + dw j].
"""

from __future__ import annotations

from torch import Tensor

from cnntrain.conv.geometry import Geometry, Pair


def unroll_width(x: Tensor, kernel: Pair, how: Geometry) -> Tensor:
    """x (N, C, H, W) -> wide (groups, H, C/groups * kw, OW * N)"""
    n, c, h, w = x.shape
    ow = how.output_size((h, w), kernel)[1]
    x = x.permute(1, 2, 3, 0).contiguous()  # (C, H, W, N)
    windows = x.as_strided(  # (groups, H, C/groups, kw, OW, N)
        (how.groups, h, c // how.groups, kernel[1], ow, n),
        (c // how.groups * h * w * n, w * n, h * w * n, how.dilation[1] * n, how.stride[1] * n, 1),
    )
    return windows.contiguous().view(how.groups, h, c // how.groups * kernel[1], ow * n)


def fold_width(wide: Tensor, size: tuple[int, ...], kernel: Pair, how: Geometry) -> Tensor:
    """wide -> x (N, C, H, W), every number added to the pixel that unroll_width copies it from."""
    n, c, h, w = size
    ow = how.output_size((h, w), kernel)[1]
    wide = wide.view(how.groups, h, c // how.groups, kernel[1], ow, n)
    x = wide.new_zeros(how.groups, h, c // how.groups, w, n)
    for j in range(kernel[1]):
        pixels = x[:, :, :, j * how.dilation[1] :][:, :, :, : how.stride[1] * ow : how.stride[1]]
        pixels += wide[:, :, :, j]
    return x.permute(4, 0, 2, 1, 3).reshape(n, c, h, w)


def kernel_row(wide: Tensor, i: int, rows: int, how: Geometry) -> Tensor:
    """What row i of the kernel meets in wide: a view (groups, OH, C/groups * kw, OW * N)"""
    return wide[:, i * how.dilation[0] :][:, : how.stride[0] * rows : how.stride[0]]


def column_matrices(wide: Tensor, kernel: Pair, rows: int, how: Geometry) -> Tensor:
    """wide -> (groups * OH, K, OW * N), a view unless there are groups or a dilated height.

    A column is a window; its K = kh * C/groups * kw numbers are in this order.
    """
    groups, h, size, run = wide.shape
    line = size * run
    columns = wide.as_strided(  # columns[., oy, i] = wide[., sh oy + dh i]
        (groups, rows, kernel[0], size, run),
        (h * line, how.stride[0] * line, how.dilation[0] * line, run, 1),
    )
    return columns.reshape(groups * rows, kernel[0] * size, run)


def weight_matrix(w: Tensor, how: Geometry) -> Tensor:
    """(O, C/groups, kh, kw) -> (groups, O/groups, K), K in the order of the columns"""
    return w.transpose(1, 2).reshape(how.groups, w.shape[0] // how.groups, w[0].numel())


def weight_from_matrix(matrix: Tensor, kernel: Pair) -> Tensor:
    """The inverse of weight_matrix."""
    return (
        matrix.flatten(0, 1).unflatten(1, (kernel[0], -1, kernel[1])).transpose(1, 2).contiguous()
    )


def rows_from_output(y: Tensor, how: Geometry) -> Tensor:
    """(N, O, OH, OW) -> (groups * OH, O/groups, OW * N)"""
    n, o, oh, ow = y.shape
    y = y.unflatten(1, (how.groups, o // how.groups))
    return y.permute(1, 3, 2, 4, 0).reshape(how.groups * oh, o // how.groups, ow * n)


def output_from_rows(rows: Tensor, size: tuple[int, ...], how: Geometry) -> Tensor:
    """The inverse of rows_from_output: (N, O, OH, OW), a view where groups = 1"""
    n, o, oh, ow = size
    rows = rows.view(how.groups, oh, o // how.groups, ow, n)
    return rows.permute(4, 0, 2, 1, 3).reshape(n, o, oh, ow)


def column_bytes(size: tuple[int, ...], kernel: Pair, how: Geometry, element_size: int) -> int:
    """What one image's columns take, for an input of size (N, C, H, W)."""
    _, c, h, w = size
    oh, ow = how.output_size((h, w), kernel)
    numbers = c * h * kernel[1] * ow
    if how.groups > 1 or how.dilation[0] > 1:  # column_matrices has to copy
        numbers += c * kernel[0] * kernel[1] * oh * ow
    return numbers * element_size
