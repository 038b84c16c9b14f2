"""im2col: every layout against nn.Conv2d, and the memory that it allocates, as measured."""

import itertools

import pytest
import torch
from convolutions import randn
from torch import nn

from cnntrain.conv import Geometry, Im2colConv2d
from cnntrain.conv import im2col as module
from cnntrain.conv.columns import Depthwise, Pointwise, Rows, Whole, layout
from cnntrain.conv.geometry import NONE
from cnntrain.conv.im2col import Im2col, Unfolded

# in_channels, out_channels, kernel, stride, dilation, groups, (height, width), its layout
SHAPES = {
    "even and odd kernel": (3, 5, (3, 2), (1, 1), (1, 1), 1, (6, 7), Rows),
    "many filters, strided, dilated width": (3, 9, (3, 3), (2, 3), (1, 2), 1, (8, 11), Rows),
    "dilated height, a stride that does not divide": (
        (3, 9, (3, 3), (2, 2), (3, 1), 1, (12, 6), Rows)
    ),
    "many channels, dilated": (64, 9, (3, 3), (2, 2), (2, 2), 1, (9, 8), Rows),
    "stride wider than the kernel": (3, 4, (2, 2), (3, 4), (1, 1), 1, (9, 12), Rows),
    "1x1": (5, 7, (1, 1), (1, 1), (1, 1), 1, (4, 5), Pointwise),
    "1x1, strided": (5, 7, (1, 1), (2, 3), (1, 1), 1, (5, 8), Pointwise),
    "whole input": (5, 7, (4, 3), (2, 1), (1, 1), 1, (4, 3), Whole),
    "depthwise": (5, 5, (3, 2), (1, 1), (1, 1), 5, (6, 7), Depthwise),
    "depthwise, strided, dilated": (5, 5, (3, 3), (2, 3), (3, 2), 5, (12, 17), Depthwise),
    "depthwise, two filters a channel": (4, 8, (3, 3), (1, 2), (1, 1), 4, (6, 7), Depthwise),
    "groups": (6, 9, (3, 2), (2, 1), (1, 2), 3, (7, 8), None),
    "groups, dilated": (6, 9, (3, 2), (2, 1), (2, 2), 3, (9, 8), None),
    "1x1 in groups": (6, 4, (1, 1), (1, 1), (1, 1), 2, (4, 5), None),
    "whole input in groups": (6, 4, (4, 3), (1, 1), (1, 1), 2, (4, 3), None),
}


def primitives(algorithm, x, w, g, geometry):
    return (
        algorithm.padded_forward(x, w, None, geometry, NONE),
        algorithm.padded_grad_input(g, w, x.shape[2:], geometry, NONE),
        algorithm.padded_grad_weight(g, x, w.shape[2:], geometry, NONE),
    )


def expected(x, w, g, geometry, padding=0):
    """PyTorch's own three functions, tested against other oracles in test_conv.py."""
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    how = geometry.stride, padding, geometry.dilation, geometry.groups
    y = nn.functional.conv2d(x, w, None, *how)
    return y.detach(), *torch.autograd.grad(y, (x, w), g)


def case(name, batch=3):
    c, o, kernel, stride, dilation, groups, size, kind = SHAPES[name]
    geometry = Geometry(stride, dilation, groups)
    x, w = randn(batch, c, *size), randn(o, c // groups, *kernel, seed=1)
    g = randn(batch, o, *geometry.output_size(size, kernel), seed=2)
    return x, w, g, geometry, kind


@pytest.mark.parametrize("algorithm", [Im2col(), Unfolded()], ids=["parts", "textbook"])
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("batch", [3, 1, 0])
def test_every_layout(name, batch, algorithm):
    x, w, g, geometry, kind = case(name, batch)
    if kind:
        assert type(layout(x.shape[1:], w.shape, geometry)) is kind
    found = primitives(algorithm, x, w, g, geometry)
    for mine, theirs in zip(found, expected(x, w, g, geometry), strict=True):
        torch.testing.assert_close(mine, theirs)
        assert mine.is_contiguous()


def test_columns_are_the_windows():
    x = torch.arange(2 * 3 * 4.0).view(1, 2, 3, 4)
    columns = Rows(x.shape[1:], (1, 2, 2, 2), Geometry()).columns(x)  # (OH, K, OW * N)
    # Under the window at (1, 2), row by row of the kernel, column by column, channel by channel.
    under = [x[0, c, 1 + i, 2 + j].item() for i, j, c in itertools.product(range(2), repeat=3)]
    assert columns.shape == (2, 8, 3)
    assert columns[1, :, 2].tolist() == under


PADDINGS = [(0, 0, 0, 0), (1, 1, 2, 2), (0, 3, 5, 1), (4, 4, 4, 4)]  # left, right, top, bottom


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("zeros", PADDINGS)
@pytest.mark.parametrize("run", [1, 2])
def test_parts_of_some_images(name, zeros, run, monkeypatch):
    monkeypatch.setattr(module, "CACHE_MIB", 1e-6)
    monkeypatch.setattr(module, "RUN", run)
    x, w, _, geometry, _ = case(name, batch=5)
    left, top = zeros[0], zeros[2]
    padded = nn.functional.pad(x, zeros)
    g = randn(5, len(w), *geometry.output_size(padded.shape[2:], w.shape[2:]), seed=2)
    algorithm = Im2col()
    _, _, batches = algorithm._parts(x, x.shape, w.shape, geometry, zeros)
    assert [len(range(5)[images]) for images in batches] == ([1] * 5 if run == 1 else [2, 2, 1])
    y, dx, dw = expected(padded, w, g, geometry)
    dx = dx[:, :, top : top + x.shape[2], left : left + x.shape[3]]
    close = torch.testing.assert_close
    close(algorithm.padded_forward(x, w, None, geometry, zeros), y)
    close(algorithm.padded_grad_input(g, w, x.shape[2:], geometry, zeros), dx)
    close(algorithm.padded_grad_weight(g, x, w.shape[2:], geometry, zeros), dw)


def peak(call):
    """The most bytes that PyTorch's allocator had given out at one time during a call."""
    with torch.profiler.profile(profile_memory=True) as profiler:
        result = call()
    blocks = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    in_use = itertools.accumulate(e.nbytes() for e in sorted(blocks, key=lambda e: e.start_ns()))
    return result, max(in_use, default=0)


# batch, in_channels, out_channels, kernel, stride, padding, dilation, groups, size
LARGE = {
    "batch": (64, 16, 32, 3, 1, 1, 1, 1, 24),
    "groups": (16, 64, 128, 3, 1, 1, 1, 8, 24),
    "strided": (32, 32, 32, 3, 2, 1, 1, 1, 32),
    "dilated": (16, 16, 32, 3, 1, 2, 2, 1, 16),
    "strided and dilated": (32, 8, 8, (7, 5), (3, 2), 4, (2, 3), 1, 32),
    "depthwise": (64, 64, 64, 3, 1, 1, 1, 64, 16),
    "depthwise, two filters a channel": (32, 16, 32, 5, 2, 2, 1, 16, 32),
    "1x1": (64, 64, 128, 1, 1, 0, 1, 1, 16),
    "1x1, strided": (64, 32, 32, 1, 2, 0, 1, 1, 32),
    "whole input": (512, 32, 16, 8, 1, 0, 1, 1, 8),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LARGE)
def test_memory_of_a_call_is_limited(name, dtype):
    n, c, o, kernel, stride, padding, dilation, groups, size = LARGE[name]
    conv = nn.Conv2d(c, o, kernel, stride, padding, dilation, groups)
    geometry, zeros = Geometry.of(conv), (padding,) * 4
    x, w = randn(n, c, size, size).to(dtype), conv.weight.detach().to(dtype)
    algorithm, plane, taps = Im2col(max_column_mib=1), x.shape[2:], w.shape[2:]
    y, forward = peak(lambda: algorithm.padded_forward(x, w, None, geometry, zeros))
    g = randn(*y.shape, seed=2).to(dtype)
    dx, backward = peak(lambda: algorithm.padded_grad_input(g, w, plane, geometry, zeros))
    dw, weights = peak(lambda: algorithm.padded_grad_weight(g, x, taps, geometry, zeros))
    beyond = [forward - y.nbytes, backward - dx.nbytes, weights - dw.nbytes]
    assert max(beyond) <= 1.05 * 2**20, beyond
    correct = expected(x.float(), w.float(), g.float(), geometry, padding)
    tolerance = 1e-5 if dtype == torch.float32 else 2**-8
    for mine, theirs in zip((y, dx, dw), correct, strict=True):
        assert (mine.float() - theirs).abs().max() <= tolerance * theirs.abs().max()


def test_larger_limit_is_used():
    x, w = randn(64, 64, 20, 20).float(), randn(64, 64, 3, 3, seed=1).float()
    how = x, w, None, Geometry(), NONE
    taken = [peak(lambda m=m: Im2col(m).padded_forward(*how))[1] for m in (1, 64)]
    assert taken[1] > taken[0] + 2 * 2**20


@pytest.mark.parametrize("value", [0, -3, 0.5, "8", None, True, 2.0])
def test_invalid_limit_is_rejected(value):
    with pytest.raises(ValueError, match=f"max_column_mib must be .*, not {value!r}$"):
        Im2colConv2d(1, 1, 1, max_column_mib=value)


def test_option_reaches_the_algorithm():
    assert Im2colConv2d(1, 1, 1, max_column_mib=7).algorithm == Im2col(max_column_mib=7)


# in_channels, out_channels, kernel, stride, padding, dilation, groups
LAYERS = [
    (3, 64, 7, 2, 3, 1, 1),
    (64, 8, 3, 1, 1, 1, 1),
    (64, 8, 3, 2, 1, 2, 1),
    (64, 8, 1, 2, 1, 1, 1),
    (4, 8, 3, 2, 1, 1, 1),
    (8, 8, 3, 1, 1, 1, 8),
    (8, 16, 3, 2, 1, 1, 8),
    (64, 8, 3, (1, 2), 1, 1, 2),
]


@pytest.mark.skipif(torch.__version__ < "2.15", reason="is not traced by older versions")
@pytest.mark.parametrize("layer", LAYERS)
def test_exported_program_takes_any_size(layer):
    """For sizes that the algorithm cuts into parts and for sizes that it does not."""
    conv = Im2colConv2d(*layer, max_column_mib=1).eval()
    channels = layer[0]
    dims = {0: torch.export.Dim("n", min=1, max=64)}
    dims |= {2: torch.export.Dim("h", min=9, max=90), 3: torch.export.Dim("w", min=9, max=90)}
    example = (torch.randn(2, channels, 20, 23),)
    program = torch.export.export(conv, example, dynamic_shapes=(dims,)).module()
    for size in [(1, 9, 10), (2, 30, 21), (64, 12, 12), (3, 90, 64)]:
        x = torch.randn(size[0], channels, *size[1:])
        torch.testing.assert_close(program(x), conv(x), atol=1e-5, rtol=1e-4)


@pytest.mark.skipif(torch.__version__ < "2.15", reason="is not traced by older versions")
@pytest.mark.parametrize("layer", [(64, 64, 3, 1, 1, 1, 1), (16, 16, 3, 1, 1, 1, 16)])
def test_one_compiled_graph_takes_every_batch_size(layer):
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    conv = Im2colConv2d(*layer, max_column_mib=1)
    compiled = torch.compile(conv, fullgraph=True, backend=count)
    for n in (2, 3, 5, 8, 16, 17, 24, 33, 40, 64):
        x = torch.randn(n, layer[0], 14, 14)
        torch.testing.assert_close(compiled(x), conv(x), atol=1e-5, rtol=1e-4)
    assert len(graphs) <= 2
