"""Checks of how a backend treats memory: strides, changes in place, shared and reused buffers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from cnntrain.lab.verify.cases import Case
from cnntrain.lab.verify.check import Finding, Subject, check, compare, results
from cnntrain.lab.verify.numerics import FLOAT64
from cnntrain.lab.verify.oracles import OUTPUT, Problem, taps

CASES = [
    Case(4, 6, 3, (3, 4, 6)),
    Case(4, 6, (2, 3), (3, 4, 6), stride=(2, 1), padding=1, groups=2),
    Case(3, 3, 3, (2, 4, 5), dilation=2, padding=2, groups=3),
    Case(4, 6, 1, (3, 4, 5)),
    Case(4, 6, 1, (3, 5, 4), stride=2, bias=False),
    Case(4, 4, 1, (2, 4, 5), groups=4),
    Case(1, 2, 3, (3, 4, 5), padding=1),
    Case(3, 2, (2, 3), (1, 4, 6)),
    Case(3, 2, (4, 5), (2, 4, 5)),
    Case(3, 2, 3, (2, 4, 5), padding=1, padding_mode="reflect"),
    Case(3, 2, 3, (5, 4), padding="same"),
]


# Each gives a tensor of the same shape and values; around it in memory are nans, that spoil the
# result of whoever reads there.


def _every_second(t: Tensor) -> Tensor:
    wide = t.new_full([2 * size for size in t.shape], torch.nan)
    view = wide[(slice(1, None, 2),) * t.dim()]
    return view.copy_(t)


def _cut_out(t: Tensor) -> Tensor:
    wide = t.new_full([size + 2 for size in t.shape], torch.nan)
    return wide[(slice(1, -1),) * t.dim()].copy_(t)


def _with_offset(t: Tensor) -> Tensor:
    flat = t.new_full([t.numel() + 7], torch.nan)
    return flat[5:-2].view(t.shape).copy_(t)


def _reversed(t: Tensor) -> Tensor:
    order = tuple(reversed(range(t.dim())))
    return t.permute(order).contiguous().permute(order)


def _channels_last(t: Tensor) -> Tensor:
    return t.movedim(-3, -1).contiguous().movedim(-1, -3)


def _transposed(t: Tensor) -> Tensor:
    return t.mT.contiguous().mT


# These change the values: all are those of the first.


def _expanded_first(t: Tensor) -> Tensor:
    return t[:1].expand(t.shape)


def _expanded_columns(t: Tensor) -> Tensor:
    return t[..., :1].expand(t.shape)


def _expanded(t: Tensor) -> Tensor:
    """As the gradient is that comes from .sum().backward()."""
    return t[(slice(1),) * t.dim()].expand(t.shape)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels_last": _channels_last,
    "transposed": _transposed,
    "dimensions in reverse": _reversed,
    "every second element": _every_second,
    "cut out of a larger one": _cut_out,
    "with an offset": _with_offset,
    "expanded from the first": _expanded_first,
    "expanded columns": _expanded_columns,
    "expanded from a number": _expanded,
}
TENSORS = {"input": "x", "weight": "w", "output gradient": "g"}
LAYOUT_CASES = [
    (case, layout, tensor)
    for tensor in (*TENSORS, "input, weight and output gradient")
    for layout in LAYOUTS
    for case in CASES
]


@check(
    "memory formats and strides",
    # There are 11 cases, so that half of the list has half of them for every layout.
    cases=lambda subject: LAYOUT_CASES[:: 2 if subject.short else 1],
    budget=FLOAT64,
)
def strides(subject: Subject, case: Case, layout: str, tensor: str) -> Iterator[Finding]:
    p = Problem.normal(case, subject.seed)
    given = {name: subject.tensor(getattr(p, name)) for name in TENSORS.values()}
    for name in [TENSORS[tensor]] if tensor in TENSORS else given:
        given[name] = LAYOUTS[layout](given[name])
    x, w, g = (given[name].cpu().numpy().copy() for name in "xwg")
    p = replace(p, x=x, w=w, g=g)
    truth, layer = taps(p), subject.loaded(p)
    layer.weight = nn.Parameter(given["w"])
    yield from compare(results(layer, given["x"], given["g"]), truth)
    with torch.no_grad():
        yield from compare({OUTPUT: layer(given["x"])}, {OUTPUT: truth[OUTPUT]})


@check("nothing changed in place", cases=lambda _: CASES)
def in_place(subject: Subject, case: Case) -> Iterator[Finding]:
    p = Problem.normal(case, subject.seed)
    layer, (x, g) = subject.loaded(p), subject.inputs(p)
    tensors = {"input": x, "output gradient": g, "weight": layer.weight}
    if layer.bias is not None:
        tensors["bias"] = layer.bias
    before = {name: t.detach().clone() for name, t in tensors.items()}

    def changed(by: str) -> Iterator[Finding]:
        for name, t in tensors.items():
            yield Finding(float(not torch.equal(t, before[name])), f"{by} changes the {name}")

    for no_gradients in (torch.no_grad, torch.inference_mode):
        with no_gradients():
            layer(x)
        yield from changed(f"a forward under {no_gradients.__name__}")
    y = layer(x.requires_grad_())
    yield from changed("the forward")
    after = y.detach().clone()
    y.backward(g)
    yield from changed("the backward")
    yield Finding(float(not torch.equal(y, after)), "the backward changes the output")


@check("results in memory of their own", cases=lambda _: CASES)
def shared(subject: Subject, case: Case) -> Iterator[Finding]:
    """Whoever works in place on a result, as activations and optimizers do, changes no other."""
    p = Problem.normal(case, subject.seed)
    layer, (x, g) = subject.loaded(p), subject.inputs(p)
    inputs = {"input": x.requires_grad_(), **dict(layer.named_parameters())}
    there: dict[str, Tensor] = {**inputs, "output gradient": g}
    for call in ("", " of the second call"):
        y = layer(x)
        gradients = torch.autograd.grad(y, list(inputs.values()), g)
        made = {f"gradient of the {name}": t for name, t in zip(inputs, gradients, strict=True)}
        for name, t in {"output": y, **made}.items():
            for other, u in there.items():
                yield Finding(float(_share(t, u)), f"{name}{call} shares memory with the {other}")
            there[name] = t


def _share(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
