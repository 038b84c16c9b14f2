"""Checks that a backend is an ``nn.Conv2d``: constructor, weights, copies, errors."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from cnntrain.lab.verify.behaviour import LAYERS
from cnntrain.lab.verify.cases import Case
from cnntrain.lab.verify.check import Finding, Subject, Wrong, check, compare, results
from cnntrain.lab.verify.numerics import FLOAT64
from cnntrain.lab.verify.oracles import OUTPUT, Problem, taps

STYLES = ["by position", "by keyword", "in float64"]


@check(
    "constructor and initial weights",
    cases=lambda _: [(case, style) for case in LAYERS for style in STYLES],
)
def constructor(subject: Subject, case: Case, style: str) -> Iterator[Finding]:
    """As nn.Conv2d's, and with as many random numbers, so that the layers after it are the same
    for the same seed too."""
    positions = (case.in_channels, case.out_channels, case.kernel_size)
    every = {**vars(Case(*positions, case.size)), **case.options()}
    del every["size"]
    arguments, options = {
        "by position": ((*positions, *list(every.values())[3:]), {}),
        "by keyword": ((), every),
        "in float64": (positions, {**case.options(), "dtype": torch.float64}),
    }[style]

    def made(kind: Callable[..., nn.Conv2d]) -> tuple[nn.Conv2d, Tensor]:
        torch.manual_seed(subject.seed)
        return kind(*arguments, **options, device=subject.device), torch.rand(3)

    (expected, then), (found, found_then) = made(nn.Conv2d), made(subject.backend)
    if not isinstance(found, nn.Conv2d):
        raise Wrong(f"is {type(found).__name__}, not derived from nn.Conv2d")
    for name in [*nn.Conv2d.__constants__, "training"]:
        right, value = getattr(expected, name), getattr(found, name, None)
        yield Finding(float(value != right), f"{name} is {value}, not {right}")
    _same_state(found.state_dict(), expected.state_dict())
    for name, right in expected.state_dict().items():
        equal = torch.equal(found.state_dict()[name], right)
        yield Finding(float(not equal), f"the initial {name} is not nn.Conv2d's for the same seed")
        learns = dict(found.named_parameters()).get(name)
        yield Finding(float(learns is None or not learns.requires_grad), f"{name} is not trained")
    found.load_state_dict(expected.state_dict())
    expected.load_state_dict(found.state_dict())
    same = torch.equal(then, found_then)
    yield Finding(float(not same), "the random numbers after it are others than after nn.Conv2d")


def _same_state(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    if list(found) != list(expected):
        raise Wrong(f"state_dict has {', '.join(found)}, not {', '.join(expected)}")
    for name, right in expected.items():
        for kind in ("shape", "dtype"):
            value, other = getattr(found[name], kind), getattr(right, kind)
            if value != other:
                raise Wrong(f"{name} has {kind} {value}, not {other}")


@check(
    "copies and pickles",
    cases=lambda s: itertools.product(LAYERS, ["deepcopy", "pickle"][: 1 + s.importable]),
    budget=FLOAT64,
)
def copies(subject: Subject, case: Case, word: str) -> Iterator[Finding]:
    p, q = (Problem.normal(case, subject.seed + i) for i in range(2))
    layer, (x, g) = subject.loaded(p), subject.inputs(p)
    results(layer, x, g)  # a copy is mostly made of a layer in use
    again = copy.deepcopy(layer) if word == "deepcopy" else pickle.loads(pickle.dumps(layer))
    yield Finding(float(type(again) is not type(layer)), f"is a {type(again).__name__}")
    yield from compare(results(again, x, g), taps(p))
    subject.load(again, q)
    yield from compare(results(layer, x, g), taps(p))


EMPTY = [
    Case(3, 2, 3, (0, 5, 6)),
    Case(4, 6, (2, 3), (0, 5, 6), stride=2, padding=1, groups=2),
    Case(4, 4, 1, (0, 5, 6), groups=4, bias=False),
    Case(3, 2, 2, (0, 5, 6), padding="same", dilation=2),
    *(Case(3, 2, 3, (0, 5, 6), padding=1, padding_mode=m) for m in ("replicate", "circular")),
]


@check("empty batch", cases=lambda _: EMPTY, unit="relative")
def empty(subject: Subject, case: Case) -> Iterator[Finding]:
    """An empty output, and zeros for the gradients of weight and bias."""
    p = Problem.normal(case, subject.seed)
    yield from compare(subject.results(p), taps(p))
    with torch.no_grad():
        y = subject.loaded(p)(subject.tensor(p.x))
    yield from compare({OUTPUT: y}, {OUTPUT: p.g})
