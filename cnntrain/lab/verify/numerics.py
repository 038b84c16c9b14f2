"""Float64 checks: outputs, gradients and higher derivatives against independent oracles.

PyTorch's own float64 convolution on a CPU is im2col, so it is not used as an oracle. These are:

- `reference_loops`: the definition, number by number, in Python.
- `scipy_signal`: scipy.signal.correlate and convolve, plane by plane.
- `by_kernel_position`: NumPy, a sum over the kernel's positions. Fast, and exact for integers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from functools import lru_cache
from weakref import WeakKeyDictionary

import numpy as np
import scipy.signal
import torch
from torch import Tensor

from cnntrain.conv.geometry import Geometry
from cnntrain.conv.naive import conv2d_reference
from cnntrain.lab.verify.cases import BIAS, INPUT, OUTPUT, WEIGHT, Case, Expected, Problem, grids
from cnntrain.lab.verify.check import Candidate, CaseError, Check, Errors, Results, compare

FLOAT64 = 1e-12  # budget: some thousand roundings
NUMPY_MODES = {"reflect": "reflect", "replicate": "edge", "circular": "wrap"}


@lru_cache(10_000)
def padding_sources(case: Case) -> np.ndarray:
    """The pixel that each pixel of the padded plane is copied from: (H', W'), -1 for zeros."""
    height, width = case.size[-2:]
    plane = np.arange(height * width).reshape(height, width)
    if case.padding_mode == "zeros":
        return np.pad(plane, case.pads, constant_values=-1)
    return np.pad(plane, case.pads, NUMPY_MODES[case.padding_mode])  # type: ignore[call-overload]


def padded(p: Problem) -> np.ndarray:
    """x (N, C, H', W')"""
    planes = _batched(p.x)
    pixels = planes.reshape(*planes.shape[:2], math.prod(planes.shape[2:]))
    zero = np.zeros_like(pixels[..., :1])
    return np.append(pixels, zero, axis=2)[..., padding_sources(p.case)]


def _unpadded(p: Problem, dx: np.ndarray) -> np.ndarray:
    """The gradient of x from that of the padded x: the sum over each pixel's copies."""
    if p.case.padding_mode == "zeros":
        (top, _), (left, _) = p.case.pads
        height, width = p.case.size[-2:]
        return dx[..., top : top + height, left : left + width].reshape(p.x.shape)
    n, c, *_ = dx.shape
    pixels = np.zeros((math.prod(p.case.size[-2:]), n * c), dx.dtype)
    source = padding_sources(p.case).ravel()
    np.add.at(pixels, source, dx.reshape(n * c, source.size).T)
    return pixels.T.reshape(p.x.shape)


def _from_padded(p: Problem, y: np.ndarray, dx: np.ndarray, dw: np.ndarray) -> Expected:
    """All quantities, from an oracle's results on the padded input without bias."""
    found = {OUTPUT: y.reshape(p.g.shape), INPUT: _unpadded(p, dx), WEIGHT: dw}
    if p.b is not None:
        found[OUTPUT] = found[OUTPUT] + p.b[:, None, None]
        found[BIAS] = _batched(p.g).sum((0, 2, 3))
    return found


def reference_loops(p: Problem) -> Expected:
    """The nested loops of the definition. Every product w x of an output's sum adds g w to the
    gradient of its pixel and g x to that of its weight."""
    x, g, filters = padded(p), _batched(p.g), p.case.out_channels // p.case.groups
    (sh, sw), (dh, dw) = p.case.steps
    geometry = Geometry((sh, sw), (dh, dw), p.case.groups)
    y = conv2d_reference(torch.from_numpy(x), torch.from_numpy(p.w), None, geometry)
    pixels, weights, gradients = x.tolist(), p.w.tolist(), g.tolist()
    pixels_g, weights_g = np.zeros_like(x).tolist(), np.zeros_like(p.w).tolist()
    _, channels, kh, kw = p.w.shape
    for n, out, r, q in itertools.product(*map(range, g.shape)):
        first, down, right = out // filters * channels, r * sh, q * sw
        gradient = gradients[n][out][r][q]
        for c, i, j in itertools.product(range(channels), range(kh), range(kw)):
            row, column = down + i * dh, right + j * dw
            pixels_g[n][first + c][row][column] += gradient * weights[out][c][i][j]
            weights_g[out][c][i][j] += gradient * pixels[n][first + c][row][column]
    return _from_padded(p, np.array(y), np.array(pixels_g), np.array(weights_g))


def scipy_signal(p: Problem) -> Expected:
    """scipy.signal on planes: for a dilation, with zeros between the kernel's values; for a stride,
    with zeros between the gradient's pixels."""
    x, g, filters = padded(p), _batched(p.g), p.case.out_channels // p.case.groups
    (sh, sw), (dh, dw), channels = *p.case.steps, p.w.shape[1]
    kernels, gradients = _spread(p.w, dh, dw), _spread(g, sh, sw)
    # The pixels that windows cover: a stride may leave a remainder at the bottom and on the right.
    height, width = (a + b - 1 for a, b in zip(gradients.shape[2:], kernels.shape[2:], strict=True))
    y, x_g, w_g = np.zeros(g.shape), np.zeros_like(x), np.zeros_like(p.w)
    correlate, convolve = scipy.signal.correlate, scipy.signal.convolve
    for n, out, c in itertools.product(range(len(x)), range(len(p.w)), range(channels)):
        pixels = (n, out // filters * channels + c, slice(height), slice(width))
        y[n, out] += correlate(x[pixels], kernels[out, c], "valid", "direct")[::sh, ::sw]
        x_g[pixels] += convolve(gradients[n, out], kernels[out, c], "full", "direct")
        w_g[out, c] += correlate(x[pixels], gradients[n, out], "valid", "direct")[::dh, ::dw]
    return _from_padded(p, y, x_g, w_g)


def by_kernel_position(p: Problem) -> Expected:
    """For each of the kernel's kh * kw positions, the products with the pixels under it."""
    x, g, groups = padded(p), _batched(p.g), p.case.groups
    (sh, sw), (dh, dw) = p.case.steps
    (n, o, oh, ow), c = g.shape, x.shape[1]
    gradients = g.reshape(n, groups, o // groups, oh * ow)
    y, x_g, w_g = np.zeros_like(gradients), np.zeros_like(x), np.zeros_like(p.w)
    for i, j in np.ndindex(*p.w.shape[2:]):
        rows = slice(i * dh, i * dh + sh * (oh - 1) + 1, sh)
        under = (..., rows, slice(j * dw, j * dw + sw * (ow - 1) + 1, sw))
        pixels = x[under].reshape(n, groups, c // groups, oh * ow)
        weights = p.w[:, :, i, j].reshape(groups, o // groups, c // groups)
        y += weights @ pixels
        x_g[under] += (weights.swapaxes(1, 2) @ gradients).reshape(n, c, oh, ow)
        w_g[:, :, i, j] = (gradients @ pixels.swapaxes(2, 3)).sum(0).reshape(o, c // groups)
    return _from_padded(p, y, x_g, w_g)


_EXPECTED: WeakKeyDictionary[Problem, Expected] = WeakKeyDictionary()


def expected(p: Problem) -> Expected:
    """`by_kernel_position`, computed once for each problem."""
    if p not in _EXPECTED:
        _EXPECTED[p] = by_kernel_position(p)
    return _EXPECTED[p]


def _batched(t: np.ndarray) -> np.ndarray:
    return t if t.ndim == 4 else t[None]


def _spread(t: np.ndarray, down: int, right: int) -> np.ndarray:
    """Zeros between the pixels of the last two dimensions."""
    *others, height, width = t.shape
    spread = np.zeros((*others, down * (height - 1) + 1, right * (width - 1) + 1), t.dtype)
    spread[..., ::down, ::right] = t
    return spread


def _against(
    oracle: Callable[[Problem], Expected], name: str, cases: Callable[[Candidate], list[Case]]
) -> Check:
    """Output and gradients in float64 against an oracle."""

    @Check(f"{{}}, {name}", cases, FLOAT64, "relative")
    def measure(candidate: Candidate, case: Case) -> Errors:
        p = Problem.normal(case, candidate.seed)
        yield from compare(candidate.results(p), oracle(p))

    return measure


against_loops = _against(reference_loops, "reference loops", lambda c: grids(0, c.short))
against_scipy = _against(scipy_signal, "scipy.signal", lambda c: grids(1, c.short))
random_layers = _against(by_kernel_position, "random layers", Candidate.random_cases)

FROZEN = {"nothing frozen": "xw", "all but the input frozen": "x", "the input frozen": "w"}
PENALTY = "a gradient penalty"


@Check(
    "{} derivatives",
    lambda c: itertools.product(c.some_cases(), [*FROZEN, PENALTY]),
    FLOAT64,
    "relative",
    ["second", "third"],
)
def higher_derivatives(candidate: Candidate, case: Case, words: str) -> Errors:
    """A convolution is linear in input x and weight w, so that its derivatives are convolutions and
    gradients again. In directions h of x, k of w and m of the bias (0 where it is frozen) that of
    s = <g, conv(x, w)> is t = <h, ds/dx> + <k, ds/dw> + <m, ds/db>, whose gradients are

        dt/dg = conv(h, w) + conv(x, k) + m     dt/dx = dx(g, k)     dt/dw = dw(g, h)

    and those of u, the same of t in directions g', h' and k', are

        du/dg = conv(h', k) + conv(h, k')       du/dx = dx(g', k)    du/dw = dw(g', h)

    The gradient penalty is |ds/dx|^2: t, with h = 2 ds/dx.
    """
    p, q, r = (Problem.normal(case, candidate.seed + i) for i in range(3))
    wanted = FROZEN.get(words, "xw")
    layer, (x, g) = candidate.layer(p), candidate.inputs(p)
    layer.requires_grad_("w" in wanted)
    leaves = [t for t in (x.requires_grad_("x" in wanted), *layer.parameters()) if t.requires_grad]
    first = torch.autograd.grad(layer(x), leaves, g.requires_grad_(), create_graph=True)
    h, k, m = q.x, q.w, q.b
    if words == PENALTY:
        wanted, h, t = "x", 2 * expected(p)[INPUT], first[0].square().sum()
    else:
        directions = [d for d, name in ((h, "x"), (k, "w"), (m, "w")) if name in wanted]
        t = _along([d for d in directions if d is not None], first)
    h, k, m = h * ("x" in wanted), k * ("w" in wanted), m if "w" in wanted else None

    def gradients(h_of: Problem, k_of: Problem) -> dict[str, tuple[Tensor, np.ndarray]]:
        """Of a sum of two convolutions, with respect to g, x and w."""
        of_h, of_k = expected(h_of), expected(k_of)
        return {
            "output gradient": (g, of_h[OUTPUT] + of_k[OUTPUT]),
            "input": (x, of_k[INPUT]),
            "weight": (layer.weight, of_h[WEIGHT]),
        }

    second = gradients(replace(p, x=h, b=None), replace(p, w=k, b=m))
    if "w" not in wanted or not x.requires_grad:
        del second["input"]
    if "x" not in wanted or not layer.weight.requires_grad:
        del second["weight"]
    found = yield from _derivatives("second", t, second)
    if words in FROZEN and len(second) == 3 and candidate.declared("third_derivatives"):
        third = gradients(replace(r, x=h, b=None), replace(r, w=k, b=None))
        yield from _derivatives("third", _along([r.g, r.x, r.w], found), third)


def _along(directions: list[np.ndarray], tensors: Sequence[Tensor]) -> Tensor:
    """The sum of inner products."""
    pairs = zip(directions, tensors, strict=True)
    return torch.stack([(torch.from_numpy(d).to(t) * t).sum() for d, t in pairs]).sum()


def _derivatives(
    order: str, of: Tensor, right: dict[str, tuple[Tensor, np.ndarray]]
) -> Generator[CaseError, None, tuple[Tensor, ...]]:
    found = torch.autograd.grad(of, [t for t, _ in right.values()], create_graph=True)
    results: Results = dict(zip(right, found, strict=True))
    for error in compare(results, {name: values for name, (_, values) in right.items()}):
        text = f"the derivative with respect to the {error.text}"
        yield error._replace(text=text, part=order)
    return found
