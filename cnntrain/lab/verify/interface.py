"""Interface of a convolution: constructor, initial weights, copies, empty batches, errors."""

from __future__ import annotations

import copy
import itertools
import pickle
import sys
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from cnntrain.lab.verify.cases import OUTPUT, Case, Problem
from cnntrain.lab.verify.check import (
    Candidate,
    CaseError,
    CaseErrors,
    CheckFailure,
    check,
    compare,
    results,
)
from cnntrain.lab.verify.layers import EMPTY_BATCHES, SMALL_LAYERS
from cnntrain.lab.verify.numerics import FLOAT64, expected

STYLES = ["by position", "by keyword", "in float64"]


@check("constructor and initial weights", cases=lambda _: itertools.product(SMALL_LAYERS, STYLES))
def constructor(candidate: Candidate, case: Case, style: str) -> CaseErrors:
    """Attributes, initial weights, and the number of random numbers drawn: with the same seed, the
    layers made afterwards are the same too."""
    positions = (case.in_channels, case.out_channels, case.kernel_size)
    every = {**vars(Case(*positions, case.size)), **case.options()}
    del every["size"]
    arguments, options = {
        "by position": ((*positions, *list(every.values())[3:]), {}),
        "by keyword": ((), every),
        "in float64": (positions, {**case.options(), "dtype": torch.float64}),
    }[style]

    def made(kind: Callable[..., nn.Conv2d]) -> tuple[nn.Conv2d, Tensor]:
        torch.manual_seed(candidate.seed)
        return kind(*arguments, **options, device=candidate.device), torch.rand(3)

    (right, then), (found, found_then) = made(nn.Conv2d), made(candidate.backend)
    if not isinstance(found, nn.Conv2d):
        raise CheckFailure(f"is {type(found).__name__}, not derived from nn.Conv2d")
    for name in [*nn.Conv2d.__constants__, "training"]:
        wanted, value = getattr(right, name), getattr(found, name, None)
        yield CaseError(float(value != wanted), f"{name} is {value}, not {wanted}")
    state, state_right = found.state_dict(), right.state_dict()
    if list(state) != list(state_right):
        raise CheckFailure(f"state_dict has {', '.join(state)}, not {', '.join(state_right)}")
    for name, wanted in state_right.items():
        for kind in ("shape", "dtype"):
            value, other = getattr(state[name], kind), getattr(wanted, kind)
            if value != other:
                raise CheckFailure(f"{name} has {kind} {value}, not {other}")
        equal = torch.equal(state[name], wanted)
        text = f"the initial {name} is not nn.Conv2d's for the same seed"
        yield CaseError(float(not equal), text)
        learns = dict(found.named_parameters()).get(name)
        trained = learns is not None and learns.requires_grad
        yield CaseError(float(not trained), f"{name} is not trained")
    found.load_state_dict(right.state_dict())
    right.load_state_dict(found.state_dict())
    text = "the random numbers after it are others than after nn.Conv2d"
    yield CaseError(float(not torch.equal(then, found_then)), text)


def importable(candidate: Candidate) -> bool:
    """Whether pickle finds the class by its name."""
    kind = candidate.kind
    module = sys.modules.get(kind.__module__)
    return getattr(module, getattr(kind, "__qualname__", ""), None) is kind


@check(
    "copies and pickles",
    cases=lambda c: itertools.product(SMALL_LAYERS, ["deepcopy", "pickle"][: 1 + importable(c)]),
    budget=FLOAT64,
)
def copies(candidate: Candidate, case: Case, word: str) -> CaseErrors:
    p, q = (Problem.normal(case, candidate.seed + i) for i in range(2))
    layer, (x, g) = candidate.layer(p), candidate.inputs(p)
    results(layer, x, g)  # layers are usually copied after their first call
    again = copy.deepcopy(layer) if word == "deepcopy" else pickle.loads(pickle.dumps(layer))
    yield CaseError(float(type(again) is not type(layer)), f"is a {type(again).__name__}")
    yield from compare(results(again, x, g), expected(p))
    candidate.load(again, q)
    yield from compare(results(layer, x, g), expected(p))
    yield from compare(results(again, x, g), expected(replace(p, w=q.w, b=q.b)))


@check("empty batch", cases=lambda _: EMPTY_BATCHES, unit="relative")
def empty_batch(candidate: Candidate, case: Case) -> CaseErrors:
    """An empty output, and zero gradients of weight and bias."""
    p = Problem.normal(case, candidate.seed)
    yield from compare(candidate.results(p), expected(p))
    with torch.no_grad():
        y = candidate.layer(p)(candidate.tensor(p.x))
    yield from compare({OUTPUT: y}, {OUTPUT: p.g})


X = "torch.zeros(2, 3, 6, 6)"
SHAPES = (
    "6, 6; 6; 1, 2, 3, 6, 6; 2, 4, 6, 6; 2, 1, 6, 6; 2, 0, 6, 6; 4, 6, 6; 2, 6, 6, 3; 2, 3, 0, 6; "
    "2, 3, 6, 0; 2, 3, 2, 6; 2, 3, 6, 2; 3, 2, 2; 0, 3, 2, 6; 0, 4, 6, 6"
)
STEPS = ("0", "-1", "(1, 0)", "(0, 1)", "1.5", "(1, 1, 1)", "None")
ARGUMENTS = [  # of the constructor, with brackets; or those after 3, 4, 3
    *("()", "(3)", "(3, 4)", "(3, 4, 3, strides=2)", "(4, 6, 3, groups=4)"),
    *(f"(4, 4, 3, groups={groups})" for groups in (0, -2, 3)),
    *(f", padding={padding!r}" for padding in ("full", "SAME", "")),
    *(f", padding='same', stride={stride}" for stride in ("2", "(1, 2)", "(3, 1)")),
    *(f", padding_mode={mode!r}" for mode in ("wrap", "constant", "Reflect", None)),
    *(f"(3, 4, {size})" for size in ("None", "'3'", "(3, -1)")),
    *(f"(3, 4, {size})" for size in ("9", "(7, 1)", "(1, 7)", "0", "(3, 0)", "(3, 3, 3)")),
    *(f", dilation={value}" for value in ("3", "(3, 1)", "(1, 3)", *STEPS)),
    *(f"(3, 4, 9, padding={value})" for value in ("1", "(2, 1)", "(1, 2)")),
    *(f", stride={value}" for value in STEPS),
    *(f", padding={value}" for value in ("-1", "(0, -1)", "1.5", "(1, 1, 1)", "None")),
    *(f", padding={value}, padding_mode='reflect'" for value in ("6", "(0, 6)")),
    *(f", padding={value}, padding_mode='circular'" for value in ("7", "(7, 0)")),
    "(3, 4, 12, padding=1, padding_mode='reflect')",
    ", padding='same', dilation=7, padding_mode='reflect'",
]
INPUTS = [
    *(f"torch.zeros({shape})" for shape in SHAPES.split("; ")),
    *("", "None", "[1.0]", "torch.tensor(1.0)", f"{X}, {X}"),
    *(f"{X}.to(torch.{d})" for d in ["float64", "bfloat16", "int64", "uint8", "bool", "complex64"]),
]
INVALID_CALLS = [
    *(f"Conv2d(3, 4, 3)({x})" for x in INPUTS),
    *(f"Conv2d{a if a.startswith('(') else f'(3, 4, 3{a})'}({X})" for a in ARGUMENTS),
    *(f"Conv2d(4, 4, 3, groups=2)(torch.zeros(2, {c}, 6, 6))" for c in (2, 8)),
    "Conv2d(4, 4, 3, groups=4)(torch.zeros(2, 1, 6, 6))",
    f"Conv2d(1, 4, 3)({X})",
]


@check("errors that nn.Conv2d raises", cases=lambda _: INVALID_CALLS)
def errors(candidate: Candidate, call: str) -> CaseErrors:
    """An exception of nn.Conv2d's type or a subclass, or AttributeError in place of TypeError."""

    def raised(kind: Callable[..., nn.Conv2d]) -> type[BaseException] | None:
        try:
            with candidate.device:
                eval(call, {"Conv2d": kind, "torch": torch})
        except (Exception, SystemExit) as error:
            return type(error)
        return None

    right, found = raised(nn.Conv2d), raised(candidate.backend)
    same = (right, found) == (TypeError, AttributeError) or (
        right is found or bool(right and found and issubclass(found, right))
    )
    names = [kind.__name__ if kind else "nothing" for kind in (found, right)]
    yield CaseError(float(not same), "raises {}, not {}".format(*names))
