"""Checks of the numbers: output and derivatives, whatever the options, sizes and strides."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import torch

from cnntrain.lab.verify.cases import SHORT_GRIDS, Case, corners, grid, random_cases
from cnntrain.lab.verify.check import (
    Check,
    Finding,
    Subject,
    check,
    compare,
    deviation,
    parameters,
    results,
    truth_of,
)
from cnntrain.lab.verify.oracles import (
    BIAS,
    INPUT,
    OUTPUT,
    QUANTITIES,
    WEIGHT,
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
    """In the short form, the two oracles share the cases."""
    if subject.short:
        return [*corners()[part::2], *grid(SHORT_GRIDS[part])]
    return [*corners(), *grid()]


seven_loops = against(loops, "seven loops", lambda subject: definite(subject, 0))
scipy_signal = against(scipys, "scipy.signal", lambda subject: definite(subject, 1))
random_layers = against(taps, "random layers", drawn)


ADJOINT = "adjoint identity, input", "adjoint identity, weight"


@check(*ADJOINT, cases=some, budget=FLOAT64)
def adjoint(subject: Subject, case: Case) -> Iterator[Finding]:
    """<g, conv(x)> = <conv^T(g), x>, and as well for the weight."""
    p = Problem.normal(case, subject.seed)
    found = truth_of(subject.results(p))
    y = found[OUTPUT] if p.b is None else found[OUTPUT] - p.b[:, None, None]
    for line, quantity, factor in zip(ADJOINT, (INPUT, WEIGHT), (p.x, p.w), strict=True):
        off = abs(np.vdot(p.g, y) - np.vdot(found[quantity], factor))
        size = max(1.0, float(np.linalg.norm(p.g) * np.linalg.norm(y)))
        yield Finding(off / size, f"the inner products differ by {off:.2g}", line)


LINEAR = "linear in the input", "linear in the weight", "gradients linear in the output's"


@check(*LINEAR, cases=some, budget=FLOAT64)
def linearity(subject: Subject, case: Case) -> Iterator[Finding]:
    """f(a u + (1 - a) v) = a f(u) + (1 - a) f(v), which leaves the bias out of it. Numbers that are
    a million times larger, or smaller, show what is squared, cut off or flushed to zero."""
    p, q = (Problem.normal(case, subject.seed + i) for i in range(2))
    of_p = truth_of(subject.results(p))
    for line, name, quantities in zip(
        LINEAR, "xwg", [(OUTPUT, WEIGHT), (OUTPUT, INPUT), (INPUT, WEIGHT, BIAS)], strict=True
    ):
        u = getattr(p, name)
        for a, v in [(2.0**20, getattr(q, name)), (2.0**-20, np.zeros_like(u))]:
            of_v = truth_of(subject.results(replace(p, **{name: v})))
            between = subject.results(replace(p, **{name: a * u + (1 - a) * v}))
            expected = {k: a * of_p[k] + (1 - a) * of_v[k] for k in quantities if k in of_p}
            scale = {k: max(1.0, a * float(abs(of_p[k]).max())) for k in expected}
            yield from compare(between, expected, scale, line=line)


@check(
    "groups equal concatenation",
    cases=lambda subject: [c for c in [*corners(), *some(subject)] if c.groups > 1],
    budget=FLOAT64,
)
def groups(subject: Subject, case: Case) -> Iterator[Finding]:
    p, n = Problem.normal(case, subject.seed), case.groups
    alone = replace(
        case, groups=1, in_channels=case.in_channels // n, out_channels=case.out_channels // n
    )
    xs, gs = (np.split(t, n, axis=-3) for t in (p.x, p.g))
    ws, bs = np.split(p.w, n), [None] * n if p.b is None else np.split(p.b, n)
    parts = [
        truth_of(subject.results(Problem(alone, x, w, b, g)))
        for x, w, b, g in zip(xs, ws, bs, gs, strict=True)
    ]
    axis = {OUTPUT: -3, INPUT: -3, WEIGHT: 0, BIAS: 0}
    joined = {q: np.concatenate([part[q] for part in parts], axis[q]) for q in parts[0]}
    yield from compare(subject.results(p), joined)


@check(
    "a split batch equals the whole",
    cases=lambda subject: [case for case in some(subject) if len(case.size) == 3],
    budget=FLOAT64,
)
def split_batch(subject: Subject, case: Case) -> Iterator[Finding]:
    """The first image and the rest, in two calls; and each image alone, without a batch."""
    p, images = Problem.normal(case, subject.seed), case.size[0]
    whole, layer = subject.results(p), subject.loaded(p)

    def part(cut: int | slice) -> Truth:
        x, g = subject.inputs(replace(p, x=p.x[cut], g=p.g[cut]))
        found = truth_of(results(layer, x, g))
        images = {} if isinstance(cut, slice) else {q: found[q][None] for q in (OUTPUT, INPUT)}
        return found | images

    cuts: list[list[int | slice]] = [[*range(images)]]
    if images > 1:
        cuts.append([slice(0, 1), slice(1, None)])
    for parts in ([part(cut) for cut in some_cuts] for some_cuts in cuts):
        for quantity in parts[0]:
            values = [one[quantity] for one in parts]
            joined = quantity in (OUTPUT, INPUT)
            expected = np.concatenate(values) if joined else np.sum(values, axis=0)
            yield from compare(whole, {quantity: expected})


@check("second derivatives", cases=some, budget=FLOAT64)
def second_derivatives(subject: Subject, case: Case) -> Iterator[Finding]:
    """The derivatives of s = <h, dx> + <k, dw> + <m, db>. A convolution is bilinear, so what they
    should be are outputs and gradients again:

        ds/dg = conv(h, w) + conv(x, k) + m     ds/dx = dx(g, k)     ds/dw = dw(g, h)
    """
    p, q = (Problem.normal(case, subject.seed + i) for i in range(2))
    layer, (x, g) = subject.loaded(p), subject.inputs(p)
    x, g = x.requires_grad_(), g.requires_grad_()
    first = torch.autograd.grad(layer(x), [x, *parameters(layer)], g, create_graph=True)
    directions = [subject.tensor(t) for t in (q.x, q.w, q.b) if t is not None]
    s = torch.stack([(d * t).sum() for d, t in zip(directions, first, strict=True)]).sum()
    dg, dx, dw = torch.autograd.grad(s, [g, x, layer.weight])
    of_h, of_k = taps(replace(p, x=q.x, b=None)), taps(replace(p, w=q.w, b=q.b))
    truth = {OUTPUT: of_h[OUTPUT] + of_k[OUTPUT], INPUT: of_k[INPUT], WEIGHT: of_h[WEIGHT]}
    for name, quantity, found in zip("gxw", truth, (dg, dx, dw), strict=True):
        error, text, _ = deviation(found, truth[quantity])
        yield Finding(error, f"the derivative with respect to {name} {text}")
