"""PyTorch's own sample inputs of `nn.functional.conv2d`, on every backend."""

import itertools
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from cnntrain.conv import BACKENDS

# The import calls this function, after which no test of the process could set torch's flags.
with mock.patch("torch.backends.disable_global_flags"):
    from torch.testing._internal.common_methods_invocations import op_db

(CONV2D,) = [op for op in op_db if op.name == "nn.functional.conv2d"]
REAL = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
COMPLEX = [torch.complex64, torch.complex128]


def layer_of(backend, weight, bias, stride=1, padding=0, dilation=1, groups=1):
    """A layer that computes F.conv2d with these arguments."""
    out_channels, channels, *kernel = weight.shape
    layer = BACKENDS[backend](
        channels * groups, out_channels, kernel, stride, padding, dilation, groups,
        bias=bias is not None, dtype=weight.dtype,
    )  # fmt: skip
    state = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
    layer.load_state_dict(state)
    return layer


def definition(x, w, stride=1, padding=0, dilation=1, groups=1):
    """A sum over the kernel's positions, without the bias, differentiable by autograd."""
    x = x if x.dim() == 4 else x[None]
    two = [(v, v) if isinstance(v, int) else v for v in (stride, dilation)]
    (sh, sw), (dh, dw) = two
    reach = dh * (w.shape[2] - 1) + 1, dw * (w.shape[3] - 1) + 1
    if padding == "same":
        around = [n for r in reversed(reach) for n in ((r - 1) // 2, r // 2)]
    else:
        ph, pw = {"valid": (0, 0)}.get(padding) or (
            (padding, padding) if isinstance(padding, int) else padding
        )
        around = [pw, pw, ph, ph]
    x = F.pad(x, around)
    rows, columns = ((n - r) // s + 1 for n, r, s in zip(x.shape[2:], reach, (sh, sw), strict=True))
    x = x.unflatten(1, (groups, -1))
    filters = w.unflatten(0, (groups, -1))
    y = 0
    for i, j in itertools.product(*map(range, w.shape[2:])):
        met = x[..., i * dh :: sh, j * dw :: sw][..., :rows, :columns]
        y = y + torch.einsum("ngchw,goc->ngohw", met, filters[..., i, j])
    return y.flatten(1, 2)


def results(x, w, b, g, options):
    """Output and gradients, by the definition."""
    x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
    y = definition(x, w, **options)
    y = y if x.dim() == 4 else y[0]
    dx, dw = torch.autograd.grad(y, (x, w), g)
    found = [y.detach(), dx, dw]
    if b is not None:
        found[0] = found[0] + b[:, None, None]
        found.append(g.sum((-1, -2)) if x.dim() == 3 else g.sum((0, 2, 3)))
    return found


@pytest.mark.parametrize("dtype", [*REAL, *COMPLEX], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_sample_inputs_forward_and_backward(backend, dtype):
    """Within one rounding of the definition in float64, and of what adding in float32 costs."""
    samples = list(CONV2D.sample_inputs("cpu", dtype, requires_grad=False))
    assert len(samples) >= 20
    exact_type = torch.complex128 if dtype.is_complex else torch.float64
    half = dtype in (torch.bfloat16, torch.float16)
    rounding = torch.finfo(dtype).eps / 2 if half else 0.0
    adding = 2**-48 if dtype in (torch.float64, torch.complex128) else 2**-20
    for number, sample in enumerate(samples):
        x, (w, b), options = sample.input, sample.args, sample.kwargs
        layer, leaf = layer_of(backend, w, b, **options), x.clone().requires_grad_()
        y = layer(leaf)
        g = torch.randn(y.shape, dtype=dtype, generator=torch.Generator().manual_seed(number))
        y.backward(g)
        found = [y, leaf.grad, layer.weight.grad, *([] if b is None else [layer.bias.grad])]
        tensors = [None if t is None else t.to(exact_type) for t in (x, w, b, g)]
        exact = results(*tensors, options)
        sums = results(*(None if t is None else t.abs() for t in tensors), options)
        for i, (t, right, size) in enumerate(zip(found, exact, sums, strict=True)):
            assert t.dtype == dtype
            assert t.shape == right.shape
            rounded = right.abs()
            if i == 0 and b is not None:  # the output may be rounded before the bias is added
                rounded = rounded + (right - tensors[2][:, None, None]).abs()
            if (
                i and backend == "native"
            ):  # PyTorch adds windows and images in this type on some CPUs
                rounded = 16 * size
            allowed = 1.01 * rounding * rounded + adding * size + torch.finfo(dtype).tiny
            off = (t.detach().to(exact_type) - right).abs()
            assert (off <= allowed).all(), (number, i, options, (off / allowed).max())
