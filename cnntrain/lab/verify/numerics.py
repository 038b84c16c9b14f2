"""Checks of the numbers in float64: outputs, gradients, and derivatives of higher order."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from cnntrain.lab.verify.cases import SHORT_GRIDS, Case, corners, grid, random_cases
from cnntrain.lab.verify.check import (
    Check,
    Finding,
    Subject,
    check,
    compare,
    deviation,
    parameters,
)
from cnntrain.lab.verify.oracles import (
    INPUT,
    OUTPUT,
    QUANTITIES,
    WEIGHT,
    Array,
    Problem,
    Truth,
    loops,
    scipys,
    taps,
)

FLOAT64 = 1e-12  # some thousand roundings


def drawn(subject: Subject) -> list[Case]:
    return list(random_cases(subject.seed, subject.cases))


def some(subject: Subject) -> list[Case]:
    """Others than the definition is checked on, for what follows from it."""
    others = random_cases(subject.seed + 1, max(subject.cases // 10, 1))
    return [*corners()[:: 3 if subject.short else 1], *others]


def each(line: str) -> list[str]:
    return [line.format(quantity) for quantity in QUANTITIES]


def against(
    oracle: Callable[[Problem], Truth], name: str, cases: Callable[[Subject], list[Case]]
) -> Check:
    """Output and gradients in float64 against an oracle."""

    @check(*each(f"{{}}, {name}"), cases=cases, budget=FLOAT64)
    def measure(subject: Subject, case: Case) -> Iterator[Finding]:
        p = Problem.normal(case, subject.seed)
        yield from compare(subject.results(p), oracle(p), line=f"{{}}, {name}")

    return measure


def definite(subject: Subject, part: int) -> list[Case]:
    """The two oracles share the cases."""
    if subject.short:
        return [*corners()[part::2], *grid(SHORT_GRIDS[part])]
    return [*corners(), *grid()[part::2]]


seven_loops = against(loops, "seven loops", lambda subject: definite(subject, 0))
scipy_signal = against(scipys, "scipy.signal", lambda subject: definite(subject, 1))
random_layers = against(taps, "random layers", drawn)


FROZEN = {"nothing frozen": "xw", "all but the input frozen": "x", "the input frozen": "w"}
PENALTY = "a gradient penalty"
HIGHER = "second derivatives", "third derivatives"


@check(
    *HIGHER,
    cases=lambda subject: itertools.product(some(subject), [*FROZEN, PENALTY]),
    budget=FLOAT64,
)
def higher_derivatives(subject: Subject, case: Case, words: str) -> Iterator[Finding]:
    """A convolution is linear in input x and weight w, so that its derivatives are convolutions and
    gradients again. In directions h of x, k of w and m of the bias (0 where it is frozen) that of
    s = <g, conv(x, w)> is t = <h, ds/dx> + <k, ds/dw> + <m, ds/db>, whose gradients are

        dt/dg = conv(h, w) + conv(x, k) + m     dt/dx = dx(g, k)     dt/dw = dw(g, h)

    and those of u, the same of t in directions g', h' and k', are

        du/dg = conv(h', k) + conv(h, k')       du/dx = dx(g', k)    du/dw = dw(g', h)

    The penalty is |ds/dx|^2: t, with h = 2 ds/dx.
    """
    p, q, r = (Problem.normal(case, subject.seed + i) for i in range(3))
    wanted = FROZEN.get(words, "xw")
    layer, (x, g) = subject.loaded(p), subject.inputs(p)
    for tensor in parameters(layer):
        tensor.requires_grad_("w" in wanted)
    leaves = [t for t in (x.requires_grad_("x" in wanted), *parameters(layer)) if t.requires_grad]
    first = torch.autograd.grad(layer(x), leaves, g.requires_grad_(), create_graph=True)
    h, k, m = q.x, q.w, q.b
    if words == PENALTY:
        wanted, h, t = "x", 2 * taps(p)[INPUT], first[0].square().sum()
    else:
        directions = [d for d, name in ((h, "x"), (k, "w"), (m, "w")) if name in wanted]
        t = _along([d for d in directions if d is not None], first)
    h, k, m = h * ("x" in wanted), k * ("w" in wanted), m if "w" in wanted else None
    of_h, of_k = taps(replace(p, x=h, b=None)), taps(replace(p, w=k, b=m))
    second = {OUTPUT: (g, of_h[OUTPUT] + of_k[OUTPUT])}
    if "w" in wanted and x.requires_grad:
        second[INPUT] = x, of_k[INPUT]
    if "x" in wanted and layer.weight.requires_grad:
        second[WEIGHT] = layer.weight, of_h[WEIGHT]
    found = yield from _derivatives(HIGHER[0], t, second)
    if (
        words not in FROZEN
        or len(second) < 3
        or not getattr(subject.kind, "third_derivatives", True)
    ):
        return
    of_h, of_k = (taps(replace(r, b=None).with_(**kept)) for kept in ({"x": h}, {"w": k}))
    third = {
        OUTPUT: (g, of_h[OUTPUT] + of_k[OUTPUT]),
        INPUT: (x, of_k[INPUT]),
        WEIGHT: (layer.weight, of_h[WEIGHT]),
    }
    yield from _derivatives(HIGHER[1], _along([r.g, r.x, r.w], found), third)


def _along(directions: list[Array], tensors: Sequence[Tensor]) -> Tensor:
    """The sum of inner products."""
    products = [
        (torch.from_numpy(d).to(t) * t).sum() for d, t in zip(directions, tensors, strict=True)
    ]
    return torch.stack(products).sum()


def _derivatives(
    line: str, of: Tensor, expected: dict[str, tuple[Tensor, Array]]
) -> Generator[Finding, None, tuple[Tensor, ...]]:
    inputs = [t for t, _ in expected.values()]
    found = torch.autograd.grad(of, inputs, create_graph=True)
    for (name, (_, right)), tensor in zip(expected.items(), found, strict=True):
        error, text, *_ = deviation(tensor, right)
        word = "output gradient" if name == OUTPUT else name.removesuffix(" gradient")
        yield Finding(error, f"the derivative with respect to the {word} {text}", line)
    return found
