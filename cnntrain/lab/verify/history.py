"""Checks that a result depends on input and parameters, and on nothing that was before or else."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import nn
from torch.autograd import grad

from cnntrain.lab.verify.cases import Case
from cnntrain.lab.verify.check import (
    Finding,
    Results,
    Subject,
    Wrong,
    check,
    collected,
    compare,
    parameters,
    results,
)
from cnntrain.lab.verify.memory import CASES
from cnntrain.lab.verify.numerics import FLOAT64
from cnntrain.lab.verify.oracles import BIAS, INPUT, OUTPUT, WEIGHT, Problem, taps


def _differ(found: Results, expected: Results) -> Iterator[Finding]:
    for quantity, t in expected.items():
        other = found[quantity]
        if t is None or other is None:
            raise Wrong(f"{quantity} is missing")
        yield Finding(float(not torch.equal(t, other)), f"{quantity} has other bits")


def repeatable(subject: Subject) -> list[Case]:
    """On a GPU, without the paddings whose gradients PyTorch adds up in any order."""
    in_order = ("zeros", "circular")
    return [c for c in CASES if subject.device.type == "cpu" or c.padding_mode in in_order]


@check("the same bits, called again", cases=repeatable)
def repeated(subject: Subject, case: Case) -> Iterator[Finding]:
    """Whatever the seed, and in evaluation mode as well."""
    p = Problem.normal(case, subject.seed)
    layer, (x, g) = subject.loaded(p), subject.inputs(p)
    first = {k: t if t is None else t.clone() for k, t in results(layer, x, g).items()}
    torch.manual_seed(subject.seed + 1)
    yield from _differ(results(layer, x, g), first)
    yield from _differ(results(layer.eval(), x, g), first)
    yield from _differ(results(layer.train(), x, g), first)


@check("global state left alone", cases=lambda _: CASES)
def settings(subject: Subject, case: Case) -> Iterator[Finding]:
    def state() -> dict[str, object]:
        return {
            "torch's random numbers": torch.get_rng_state().tolist(),
            "numpy's random numbers": str(np.random.get_state()),  # noqa: NPY002
            "Python's random numbers": random.getstate(),
            "the default dtype": torch.get_default_dtype(),
            "the number of threads": torch.get_num_threads(),
            "whether gradients are on": torch.is_grad_enabled(),
            "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        }

    p = Problem.normal(case, subject.seed)
    layer, (x, g) = subject.loaded(p), subject.inputs(p)
    before = state()
    results(layer, x, g)
    for name, value in state().items():
        yield Finding(float(value != before[name]), f"a pass changes {name}")


def _other_sizes(subject: Subject, p: Problem) -> Iterator[Finding]:
    layer = subject.loaded(p)
    *batch, height, width = p.case.size
    sizes = [(*batch, height + 1, width), (*batch, height, width + 3), (7, height, width)]
    for size in (p.case.size, *sizes, sizes[0], p.case.size):
        case = replace(p.case, size=size)
        q = Problem.normal(case, subject.seed)
        q = replace(q, w=p.w, b=p.b)
        yield from compare(results(layer, *subject.inputs(q)), taps(q))


def _other_numbers(subject: Subject, p: Problem) -> Iterator[Finding]:
    layer, q = subject.loaded(p), _other(subject, p)
    for problem in (p, q, p):
        yield from compare(results(layer, *subject.inputs(problem)), taps(problem))


def _same_memory(subject: Subject, p: Problem) -> Iterator[Finding]:
    """As a loader does that fills one buffer again and again."""
    layer, (x, g) = subject.loaded(p), subject.inputs(p)
    q = _other(subject, p)
    yield from compare(results(layer, x, g), taps(p))
    x.data.copy_(subject.tensor(q.x))  # does not count as a change of version
    g.data.copy_(subject.tensor(q.g))
    yield from compare(results(layer, x, g), taps(q))


def _outputs_first(subject: Subject, p: Problem) -> Iterator[Finding]:
    layer, q = subject.loaded(p), _other(subject, p)
    yield from _interleaved(subject, [(layer, p), (layer, q)])


def _two_layers(subject: Subject, p: Problem) -> Iterator[Finding]:
    q = Problem.normal(p.case, subject.seed + 1)
    yield from _interleaved(subject, [(subject.loaded(r), r) for r in (p, q, p)])


def _interleaved(subject: Subject, pairs: list[tuple[nn.Conv2d, Problem]]) -> Iterator[Finding]:
    """All outputs, then all gradients."""
    passes = []
    for layer, p in pairs:
        x, g = subject.inputs(p)
        passes.append((layer, p, x.requires_grad_(), g, layer(x)))
    for layer, p, x, g, y in passes:
        layer.zero_grad()
        y.backward(g)
        yield from compare(collected(layer, x, y), taps(p))


def _weight_changed(subject: Subject, p: Problem) -> Iterator[Finding]:
    layer, (x, g) = subject.loaded(p), subject.inputs(p)
    results(layer, x, g)
    q = Problem.normal(p.case, subject.seed + 1)
    q = replace(p, w=q.w, b=q.b)
    subject.load(layer, q)
    yield from compare(results(layer, x, g), taps(q))
    with torch.no_grad():
        layer.weight.data.mul_(2)
    q = replace(q, w=2 * q.w)
    yield from compare(results(layer, x, g), taps(q))
    layer.weight = nn.Parameter(subject.tensor(p.w))
    yield from compare(results(layer, x, g), taps(replace(q, w=p.w)))


def _moved(subject: Subject, p: Problem) -> Iterator[Finding]:
    layer = subject.loaded(p, torch.float32)
    results(layer, *subject.inputs(p, torch.float32))
    subject.load(layer.double(), p)
    yield from compare(results(layer, *subject.inputs(p)), taps(p))


def _graph_twice(subject: Subject, p: Problem) -> Iterator[Finding]:
    layer, q = subject.loaded(p), _other(subject, p)
    x = subject.tensor(p.x).requires_grad_()
    y = layer(x)
    for problem in (p, q, p):
        expected = taps(replace(p, g=problem.g))
        del expected[OUTPUT]
        found = grad(y, [x, *parameters(layer)], subject.tensor(problem.g), retain_graph=True)
        yield from compare(dict(zip(expected, found, strict=True)), expected)


def _accumulated(subject: Subject, p: Problem) -> Iterator[Finding]:
    layer, (x, g) = subject.loaded(p), subject.inputs(p)
    x.requires_grad_()
    for _ in range(3):
        layer(x).backward(g)
    y = layer(x)
    expected = {q: t * (1 if q == OUTPUT else 3) for q, t in taps(p).items()}
    yield from compare(collected(layer, x, y), expected)


def _input_changed(subject: Subject, p: Problem) -> Iterator[Finding]:
    """Between forward and backward: autograd notices, or the backward no longer needs it."""
    layer, (x, g) = subject.loaded(p), subject.inputs(p)
    leaf = x.clone().requires_grad_()
    x = leaf * 1
    y = layer(x)
    x.detach().zero_()  # detached from the graph, and seen by its version counter all the same
    try:
        y.backward(g)
    except RuntimeError:
        yield Finding(0.0, "")
    else:
        yield from compare(collected(layer, leaf, y), taps(p))


def _other(subject: Subject, p: Problem) -> Problem:
    """Another input for the same layer."""
    return replace(Problem.normal(p.case, subject.seed + 1), w=p.w, b=p.b)


HISTORIES = {
    "after inputs of other sizes": _other_sizes,
    "after another input of the same size": _other_numbers,
    "after another input in the same memory": _same_memory,
    "two outputs before their gradients": _outputs_first,
    "layers of the same shape in turns": _two_layers,
    "after a change of the weight": _weight_changed,
    "after a move to float64": _moved,
    "gradients of one output several times": _graph_twice,
    "gradients accumulated": _accumulated,
    "the input changed before the backward": _input_changed,
}


@check(
    "nothing remembered",
    cases=lambda _: [(case, name) for name in HISTORIES for case in CASES],
    budget=FLOAT64,
)
def history(subject: Subject, case: Case, name: str) -> Iterator[Finding]:
    yield from HISTORIES[name](subject, Problem.normal(case, subject.seed))


SUBSETS = [
    [q for q, bit in zip((INPUT, WEIGHT, BIAS), f"{bits:03b}", strict=True) if bit == "1"]
    for bits in range(8)
]


@check(
    "gradients only where asked for",
    cases=lambda _: [
        (case, f"with {' and '.join(needs)}" if needs else "without gradients")
        for case in CASES
        for needs in SUBSETS
        if case.bias or BIAS not in needs
    ],
    budget=FLOAT64,
)
def asked(subject: Subject, case: Case, words: str) -> Iterator[Finding]:
    p = Problem.normal(case, subject.seed)
    layer, (x, g) = subject.loaded(p), subject.inputs(p)
    tensors = {INPUT: x, WEIGHT: layer.weight, BIAS: layer.bias}
    for quantity, t in tensors.items():
        if t is not None:
            t.requires_grad_(quantity in words)
    truth = taps(p)
    y = layer(x)
    yield from compare({OUTPUT: y}, {OUTPUT: truth[OUTPUT]})
    needed = words != "without gradients"
    yield Finding(
        float(y.requires_grad != needed), f"the output's requires_grad is {y.requires_grad}"
    )
    if needed:
        y.backward(g)
    for quantity, t in tensors.items():
        if t is not None and quantity not in words:
            yield Finding(float(t.grad is not None), f"there is a {quantity} that nobody asked for")
    found = collected(layer, x, y)
    yield from compare(found, {q: t for q, t in truth.items() if q in words})
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            y = layer(x)
        yield from compare({OUTPUT: y}, {OUTPUT: truth[OUTPUT]})
        yield Finding(
            float(y.requires_grad), f"the output under {mode.__name__} requires a gradient"
        )
