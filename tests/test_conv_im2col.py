"""im2col: every layout against nn.Conv2d, and what columns take, as measured."""

import itertools

import pytest
import torch
from test_conv import randn
from torch import nn

from cnntrain.conv import Geometry, Im2colConv2d, depthwise
from cnntrain.conv.columns import LONG, Pointwise, Rows, Whole, layout, tiles
from cnntrain.conv.im2col import Im2col

# in_channels, out_channels, kernel, stride, dilation, groups, (height, width), its layout
SHAPES = {
    "unrolled": (3, 5, (3, 2), (1, 1), (1, 1), 1, (6, 7), Rows),
    "unrolled, many filters": (3, 9, (3, 3), (2, 3), (1, 2), 1, (8, 11), Rows),
    "unrolled, dilated height, a stride that does not divide": (
        (3, 9, (3, 3), (2, 2), (3, 1), 1, (12, 6), Rows)
    ),
    "one product for each tap": (LONG, 5, (2, 3), (1, 1), (1, 1), 1, (5, 6), Rows),
    "one product for each tap, strided": (LONG, 9, (3, 3), (2, 2), (2, 2), 1, (9, 8), Rows),
    "gathered input gradient": (32, 8, (3, 3), (1, 1), (1, 1), 1, (24, 25), Rows),
    "stride wider than the kernel": (3, 4, (2, 2), (3, 4), (1, 1), 1, (9, 12), Rows),
    "groups": (6, 9, (3, 2), (2, 1), (1, 2), 3, (7, 8), Rows),
    "depthwise with two filters a channel": (4, 8, (3, 3), (1, 2), (1, 1), 4, (6, 7), Rows),
    "1x1 in groups": (6, 4, (1, 1), (1, 1), (1, 1), 2, (4, 5), Rows),
    "1x1": (5, 7, (1, 1), (1, 1), (1, 1), 1, (4, 5), Pointwise),
    "1x1, strided": (5, 7, (1, 1), (2, 3), (1, 1), 1, (5, 8), Pointwise),
    "whole input": (5, 7, (4, 3), (2, 1), (1, 1), 1, (4, 3), Whole),
    "whole input in groups": (6, 4, (4, 3), (1, 1), (1, 1), 2, (4, 3), Whole),
    "depthwise": (5, 5, (3, 2), (1, 1), (1, 1), 5, (6, 7), None),
    "depthwise, strided, dilated": (5, 5, (3, 3), (2, 3), (3, 2), 5, (12, 17), None),
    "depthwise, dilation a multiple of the stride": (
        4,
        4,
        (3, 3),
        (2, 2),
        (2, 4),
        4,
        (11, 17),
        None,
    ),
    "depthwise, rows longer than a block": (3, 3, (2, 5), (1, 2), (1, 1), 3, (4, 145), None),
    "depthwise, several rows in a block": (3, 3, (3, 3), (2, 1), (1, 2), 3, (19, 11), None),
}


def primitives(algorithm, x, w, g, geometry):
    return (
        algorithm.forward(x, w, geometry),
        algorithm.grad_input(g, w, x.shape[2:], geometry),
        algorithm.grad_weight(g, x, w.shape[2:], geometry),
    )


def expected(x, w, g, geometry):
    """PyTorch's own three, which the seven loops and scipy confirm in test_conv.py."""
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    y = nn.functional.conv2d(x, w, None, geometry.stride, 0, geometry.dilation, geometry.groups)
    return y.detach(), *torch.autograd.grad(y, (x, w), g)


def case(name, batch=3):
    c, o, kernel, stride, dilation, groups, size, kind = SHAPES[name]
    geometry = Geometry(stride, dilation, groups)
    x, w = randn(batch, c, *size), randn(o, c // groups, *kernel, seed=1)
    g = randn(batch, o, *geometry.output_size(size, kernel), seed=2)
    return x, w, g, geometry, kind


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("batch", [3, 1, 0])
def test_every_layout(name, batch):
    x, w, g, geometry, kind = case(name, batch)
    if kind:
        assert type(layout(x.shape, w.shape[2:], geometry)) is kind
    found = primitives(Im2col(), x, w, g, geometry)
    for mine, theirs in zip(found, expected(x, w, g, geometry), strict=True):
        torch.testing.assert_close(mine, theirs)
        assert mine.is_contiguous()


def test_columns_are_the_windows():
    x = torch.arange(2 * 3 * 4.0).view(1, 2, 3, 4)
    (columns,) = layout(x.shape, (2, 2), Geometry()).columns(x)  # (OH, K, OW * N)
    # Under the window at (1, 2), row by row of the kernel, column by column, channel by channel.
    under = [x[0, c, 1 + i, 2 + j].item() for i, j, c in itertools.product(range(2), repeat=3)]
    assert columns.shape == (2, 8, 3)
    assert columns[1, :, 2].tolist() == under


@pytest.mark.parametrize("name", [name for name in SHAPES if SHAPES[name][-1]])
@pytest.mark.parametrize("room", [1, 40, 300, 2000])
def test_every_tiling_covers_the_output_once(name, room):
    x, w, g, geometry, _ = case(name)
    seen = torch.zeros_like(g)
    y = torch.zeros_like(g)
    for here, there in tiles(x.shape, w.shape[2:], geometry, room):
        part = x[here]
        seen[there] += 1
        y[there] = Im2col().forward(part, w, geometry)
        columns = layout(part.shape, w.shape[2:], geometry).column_size()
        assert columns <= room or y[there].shape[2:] == (1, 1)
    assert torch.equal(seen, torch.ones_like(g))
    torch.testing.assert_close(y, expected(x, w, g, geometry)[0])


def peak(call):
    """The most bytes that PyTorch's allocator had given out at one time during a call."""
    with torch.profiler.profile(profile_memory=True) as profiler:
        result = call()
    blocks = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    in_use = itertools.accumulate(e.nbytes() for e in sorted(blocks, key=lambda e: e.start_ns()))
    return result, max(in_use, default=0)


@pytest.mark.parametrize("name", [name for name in SHAPES if SHAPES[name][-1]])
def test_columns_take_no_more_than_they_say(name):
    x, w, g, geometry, _ = case(name, batch=16)
    matrices = layout(x.shape, w.shape[2:], geometry)
    allowed = matrices.column_size() * x.element_size()
    _, unrolled = peak(lambda: matrices.columns(x))
    assert unrolled <= allowed
    rows = matrices.rows(g)
    dx, folded = peak(lambda: matrices.col2im(w, rows))
    filters = 2 * w.numel() * len(rows)
    assert folded <= allowed + (2 * dx.numel() + filters) * x.element_size()


@pytest.mark.parametrize(("channels", "groups"), [(16, 1), (64, 1), (16, 4), (64, 64)])
def test_a_limit_holds_whatever_the_batch_and_the_image(channels, groups):
    geometry, mib = Geometry(groups=groups), 2**20
    w = randn(8 * groups, channels // groups, 3, 3, seed=1).float()
    if groups == channels:
        w = w[:groups]
    extra = []
    for size in [(32, channels, 20, 20), (128, channels, 20, 20), (1, channels, 160, 160)]:
        x = randn(*size).float()
        y, forward = peak(lambda x=x: Im2col(max_column_mib=1).forward(x, w, geometry))
        torch.testing.assert_close(
            y, nn.functional.conv2d(x, w, groups=groups), atol=1e-4, rtol=1e-4
        )
        extra.append((forward - y.nbytes) / mib)
    # Columns, and the rows of the output that are made of them at a time.
    assert max(extra) < 1 + 0.7, extra
    _, unlimited = peak(lambda: Im2col(max_column_mib=64).forward(x, w, geometry))
    assert groups == channels or (unlimited - y.nbytes) / mib > 2


def test_toeplitz_matrices_have_a_limit():
    w, geometry = randn(64, 1, 5, 5), Geometry(groups=64)
    seen = torch.zeros(6, 64, 30, 30)
    for block, places in depthwise._blocks(seen.shape, w, geometry, room=200_000):
        assert block.toeplitz(w[places[0][0][1]]).nbytes <= 200_000
        for _, there in places:
            seen[there] += 1
    assert torch.equal(seen, torch.ones_like(seen))


def test_the_option_reaches_the_algorithm():
    assert Im2colConv2d(1, 1, 1, max_column_mib=7).algorithm == Im2col(max_column_mib=7)


@pytest.mark.parametrize(
    ("channels", "kernel_size", "stride", "dilation", "groups"),
    [
        (64, 3, 2, 1, 1),
        (64, 3, 2, 2, 1),
        (64, 3, 1, 1, 1),
        (4, 3, 2, 1, 1),
        (64, 1, 2, 1, 1),
        (8, 3, 2, 1, 8),
        (64, 3, (1, 2), 1, 2),
    ],
)
def test_an_exported_program_computes_the_same_for_any_batch(
    channels: int, kernel_size: int, stride: int | tuple[int, int], dilation: int, groups: int
) -> None:
    """What is a view for one image must not be taken for the copy that it is for two."""
    conv = Im2colConv2d(channels, 8, kernel_size, stride, 1, dilation, groups).eval()
    example = (torch.randn(2, channels, 9, 9),)
    sizes = ({0: torch.export.Dim("batch", min=1, max=16)},)
    program = torch.export.export(conv, example, dynamic_shapes=sizes).module()
    for batch in (1, 2, 3, 16):
        x = torch.randn(batch, channels, 9, 9)
        torch.testing.assert_close(program(x), conv(x))
