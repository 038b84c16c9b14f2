"""State of a convolution: results may depend on the input and the parameters alone.

Modes, cached weights and options, shared memory, autograd graphs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from cnntrain.lab.verify.cases import BIAS, INPUT, OUTPUT, WEIGHT, Problem
from cnntrain.lab.verify.check import CaseError, Errors, arrays, results
from cnntrain.lab.verify.layers import DTYPES, MODES, UNFROZEN, IntegerLayer, layer_check
from cnntrain.lab.verify.numerics import expected


@layer_check("modes in any order", MODES, MODES, step=11)
def modes(t: IntegerLayer, first: str, then: str) -> Errors:
    for mode in (first, then, "train"):
        yield from t.one_pass(mode=mode)


def _set_data(t: Tensor, new: Tensor) -> None:
    t.data = new


def _replace_parameters(layer: nn.Conv2d, new: dict[str, Tensor]) -> None:
    for name, t in new.items():
        setattr(layer, name, nn.Parameter(t))


def _each(change: Callable[[Tensor, Tensor], Any]) -> Callable[[nn.Conv2d, dict[str, Tensor]], Any]:
    return lambda layer, new: [change(t, new[name]) for name, t in layer.named_parameters()]


CHANGES: dict[str, Callable[[nn.Conv2d, dict[str, Tensor]], Any]] = {
    "load_state_dict": lambda layer, new: layer.load_state_dict(new),
    "load_state_dict(assign=True)": lambda layer, new: layer.load_state_dict(new, assign=True),
    "add_, as by an optimizer": _each(lambda t, new: t.add_(t - new, alpha=-1)),
    "copy_ under no_grad": _each(lambda t, new: t.copy_(new)),
    ".data =": _each(_set_data),
    ".data.copy_": _each(lambda t, new: t.data.copy_(new)),  # does not change the version of t
    "new Parameters": _replace_parameters,
}


@layer_check("parameters changed between calls", CHANGES, UNFROZEN, UNFROZEN, step=31, full=5)
def changed_parameters(t: IntegerLayer, change: str, before: str, after: str) -> Errors:
    yield from t.one_pass(mode=before)
    with torch.no_grad():
        CHANGES[change](t.layer, t.candidate.parameters(q := t.problem(weights=1), t.dtype))
    yield from t.one_pass(q, after)


def _other_sizes(t: IntegerLayer) -> Errors:
    *batch, height, width = t.case.size
    sizes = [(*batch, height + 1, width), (*batch, height, width + 3), (7, height, width)]
    if t.case.padding and width != height:  # the same number of pixels in another shape
        sizes.insert(0, (*batch, width, height))
    order = (t.case.size, *sizes, sizes[0], t.case.size)
    return t.passes(*(t.problem(size=size) for size in order))


def _same_memory(t: IntegerLayer) -> Errors:
    """A loader may fill one buffer again and again."""
    q, (x, g) = t.problem(1), t.inputs()
    yield from t.compare(results(t.layer, x, g), t.p)
    x.data.copy_(t.candidate.tensor(q.x))  # does not change the version of x
    g.data.copy_(t.candidate.tensor(q.g))
    yield from t.compare(results(t.layer, x, g), q)


def _two_layers(t: IntegerLayer) -> Errors:
    others = [(t.candidate.layer(q, t.dtype), q) for q in (t.problem(1, 1), t.p)]
    yield from _interleaved(t, *others)


def _interleaved(t: IntegerLayer, *others: tuple[nn.Conv2d, Problem]) -> Errors:
    """All outputs, then all gradients."""
    pairs = [(t.layer, t.p), *others]
    passes = [(layer, p, x := t.inputs(p)[0], layer(x)) for layer, p in pairs]
    for layer, p, x, y in passes:
        yield from t.differentiated(y, [x, *layer.parameters()], p)


def _moved(t: IntegerLayer) -> Errors:
    for dtype in (*DTYPES, *DTYPES[1::2]):
        t.dtype = getattr(torch, dtype)
        t.layer.to(t.dtype)
        yield from t.passes(t.p)


def _functional_call(t: IntegerLayer) -> Errors:
    q = t.problem(1, 1)
    for p, given in ((t.p, {}), (q, t.candidate.parameters(q, t.dtype)), (t.p, {})):
        used: dict[str, Tensor] = given or dict(t.layer.named_parameters())
        (x, _), tensors = t.inputs(p), [tensor.requires_grad_() for tensor in used.values()]
        yield from t.differentiated(functional_call(t.layer, used, (x,)), [x, *tensors], p)


def _graph_twice(t: IntegerLayer) -> Errors:
    y = t.layer(x := t.inputs()[0])
    for p in (t.p, replace(t.p, g=t.problem(1).g), t.p):
        yield from t.differentiated(y, [x, *t.layer.parameters()], p)


def _accumulated(t: IntegerLayer) -> Errors:
    x, g = t.inputs()
    for _ in range(3):
        t.layer(x).backward(g)
    found = t.collected(x, t.layer(x))
    yield from t.compare(found, replace(t.p, g=3 * t.p.g))


def _input_changed(t: IntegerLayer) -> Errors:
    """Between forward and backward: autograd raises, or the backward does not need the input."""
    leaf, g = t.inputs()
    x = leaf * 1
    y = t.layer(x)
    x.detach().zero_()  # changes the version of x, and no graph
    with contextlib.suppress(RuntimeError):
        y.backward(g)
        yield from t.compare(t.collected(leaf, y), t.p)


def _output_changed(t: IntegerLayer) -> Errors:
    """By ReLU(inplace=True), before the backward."""
    x, g = t.inputs()
    output = expected(t.p)[OUTPUT]
    g = g * t.candidate.tensor(abs(output) > 0.5)  # the sign of an inexact zero is arbitrary
    (y := t.layer(x).relu_()).backward(g)
    right = expected(replace(t.p, g=t.p.g * (output > 0))) | {OUTPUT: output.clip(0)}
    yield from t.compare(t.collected(x, y), right)


def _many_calls(t: IntegerLayer, gradients: bool) -> Errors:
    """Thirty calls, of which ten outputs are kept: none may reuse the memory of another, and an
    implementation that benchmarks several algorithms in its first calls has chosen one."""
    problems, made = [t.problem(i) for i in range(7)], []
    for number in range(30):
        p = problems[number % 7]
        made.append((p, t.call(*t.inputs(p), gradients)))
        del made[:-10]
    for p, found in made:
        yield from t.compare(found, p, *found)


def _other_options(t: IntegerLayer) -> Errors:
    """nn.Conv2d reads its options at each call."""
    yield from t.passes(t.p)
    options: dict[str, Any] = {"stride": (1, 2), "dilation": (2, 1), "padding": (1, 2)}
    if t.case.padding == "same":
        del options["stride"]
    if t.case.padding_mode != "zeros":
        del options["padding"]
    elif not isinstance(t.case.padding, str):
        options["padding_mode"] = "circular"
    for name, value in options.items():
        before = getattr(t.layer, name)
        setattr(t.layer, name, value)
        yield from t.passes(t.problem(**{name: value}, size=(*t.case.size[:-2], 8, 13)))
        setattr(t.layer, name, before)
    yield from t.passes(t.p)


HISTORIES: dict[str, Callable[[IntegerLayer], Errors]] = {
    "after inputs of other sizes": _other_sizes,
    "after another input of the same size": lambda t: t.passes(*map(t.problem, (0, 1, 0))),
    "after another input in the same memory": _same_memory,
    "two outputs before their gradients": lambda t: _interleaved(t, (t.layer, t.problem(1))),
    "layers of the same shape in turns": _two_layers,
    "after a move to other dtypes": _moved,
    "functional_call with other parameters": _functional_call,
    "gradients of one output several times": _graph_twice,
    "gradients accumulated": _accumulated,
    "the input changed before the backward": _input_changed,
    "the output changed before the backward": _output_changed,
    "thirty calls, ten outputs kept": lambda t: _many_calls(t, gradients=True),
    "thirty calls without gradients": lambda t: _many_calls(t, gradients=False),
    "options changed after the first call": _other_options,
}


@layer_check("no state between calls", HISTORIES, step=3)
def history(t: IntegerLayer, name: str) -> Errors:
    return HISTORIES[name](t)


@layer_check("results share no memory", exact=False)
def shared(t: IntegerLayer) -> Errors:
    """Activations and optimizers work in place on results, which may change no other tensor."""
    x, g = t.inputs()
    inputs = {"input": x, **dict(t.layer.named_parameters())}
    known: dict[str, Tensor] = {**inputs, "output gradient": g}
    for call in ("", " of the second call"):
        y = t.layer(x)
        gradients = torch.autograd.grad(y, list(inputs.values()), g)
        made = {f"gradient of the {name}": d for name, d in zip(inputs, gradients, strict=True)}
        for name, values in {"output": y, **made}.items():
            for other, u in known.items():
                same = values.untyped_storage().data_ptr() == u.untyped_storage().data_ptr()
                yield CaseError(same, f"{name}{call} shares memory with the {other}")
            known[name] = values


@layer_check("bitwise repeatable", exact=False)
def repeated(t: IntegerLayer) -> Errors:
    """For any seed, and in evaluation mode as well."""
    if t.candidate.device.type != "cpu" and t.case.padding_mode in ("reflect", "replicate"):
        return  # on a GPU, PyTorch adds up the gradients of these paddings in any order
    t.candidate.load(t.layer, p := Problem.normal(t.case, t.candidate.seed))
    x, g = t.inputs(p)
    first = arrays(results(t.layer, x, g))
    torch.manual_seed(t.candidate.seed + 1)
    for mode in (True, False, True):
        for quantity, values in arrays(results(t.layer.train(mode), x, g)).items():
            same = np.array_equal(values, first[quantity])
            yield CaseError(not same, f"{quantity} has other bits")


SUBSETS = ["nothing", INPUT, WEIGHT, BIAS]
SUBSETS += [f"{INPUT} and {WEIGHT}", f"{INPUT} and {BIAS}", f"{WEIGHT} and {BIAS}"]


@layer_check("only required gradients", SUBSETS, step=3)
def required_gradients(t: IntegerLayer, needs: str) -> Errors:
    layer, (x, g) = t.layer, t.inputs()
    tensors = {INPUT: x, **dict(zip((WEIGHT, BIAS), layer.parameters(), strict=False))}
    for quantity, values in tensors.items():
        values.requires_grad_(quantity in needs)
    y = layer(x)
    right = any(values.requires_grad for values in tensors.values())
    yield CaseError(y.requires_grad != right, f"the output's requires_grad is {not right}")
    if right:
        y.backward(g)
    for quantity, values in tensors.items():
        surplus = quantity not in needs and values.grad is not None
        yield CaseError(surplus, f"there is a {quantity}")
    found = t.collected(x, y)
    yield from t.compare(found, t.p, OUTPUT, *(q for q in found if q in needs))
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            y = layer(x)
        yield CaseError(y.requires_grad, f"the output under {mode.__name__} requires a gradient")
