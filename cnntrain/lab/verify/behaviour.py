"""Checks that results depend on the input and the parameters alone: modes, caches, memory, threads.

All are made with small integers, whose sums every dtype holds exactly, in each of the dtypes: an
implementation may take another path for each.
"""

from __future__ import annotations

import contextlib
import gc
import io
import itertools
import logging
import operator
import random
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from cnntrain.lab.verify.cases import Case
from cnntrain.lab.verify.check import (
    EXACT,
    Finding,
    Results,
    Subject,
    array,
    check,
    collected,
    compare,
    parameters,
    results,
    truth_of,
)
from cnntrain.lab.verify.oracles import BIAS, INPUT, OUTPUT, QUANTITIES, WEIGHT, Problem, Truth

LAYERS = [
    Case(4, 6, 3, (3, 4, 6)),
    Case(4, 6, (2, 3), (3, 5, 6), stride=(2, 1), padding=1, groups=2),  # a row is left over
    Case(4, 6, 1, (3, 4, 5)),
    Case(3, 3, 3, (2, 4, 5), dilation=2, padding=2, groups=3),
    Case(3, 2, (4, 5), (2, 4, 5)),
    Case(4, 6, 1, (3, 5, 4), stride=2, bias=False),
    Case(4, 4, 1, (2, 4, 5), groups=4),
    Case(1, 2, 3, (3, 4, 5), padding=1),
    Case(3, 2, (2, 3), (1, 4, 6)),
    Case(3, 2, 3, (2, 4, 5), padding=1, padding_mode="reflect"),
    Case(3, 2, 3, (5, 4), padding="same"),
    Case(7, 9, 3, (2, 5, 4), padding=1),
    Case(10, 6, (3, 2), (2, 5, 6), stride=2, groups=2),
]
DTYPES = ["float32", "bfloat16", "float16", "float64"]


class Trial:
    """A layer in some dtype, with the parameters of a problem of small integers."""

    def __init__(self, subject: Subject, case: Case, dtype: str) -> None:
        self.subject, self.case, self.dtype = subject, case, getattr(torch, dtype)
        self.p = self.problem()
        self.layer = subject.loaded(self.p, self.dtype)

    def problem(self, other: int = 0, weights: int = 0, **options: Any) -> Problem:
        """Other numbers, and other options of the case."""
        case, seed = replace(self.case, **options), self.subject.seed
        return Problem.small(case, seed + other, seed + weights)

    def inputs(self, p: Problem | None = None) -> tuple[Tensor, Tensor]:
        """x, which requires a gradient, and g."""
        x, g = self.subject.inputs(p or self.p, self.dtype)
        return x.requires_grad_(), g

    def new_parameters(self, p: Problem) -> dict[str, Tensor]:
        given = {"weight": p.w, "bias": p.b}
        return {n: self.subject.tensor(t, self.dtype) for n, t in given.items() if t is not None}

    def right(self, found: Results, truth: Truth) -> Iterator[Finding]:
        """Of the quantities found, or of those that are to be."""
        yield from compare(found, truth, 1.0, self.dtype)

    def after_backward(self, x: Tensor, y: Tensor, truth: Truth) -> Iterator[Finding]:
        return self.right(collected(self.layer, x, y), truth)

    def differentiated(
        self, y: Tensor, inputs: Iterable[Tensor], p: Problem, **options: Any
    ) -> Iterator[Finding]:
        """Of the output and its gradients by autograd.grad."""
        gradients = torch.autograd.grad(
            y, list(inputs), self.subject.tensor(p.g, self.dtype), **options
        )
        return self.right(dict(zip(p.truth, (y, *gradients), strict=True)), p.truth)

    def one_pass(self, p: Problem | None = None, mode: str = "train") -> Iterator[Finding]:
        """Output and gradients in a mode."""
        p = p or self.p
        (x, g), layer = self.inputs(p), self.layer
        if layer.training == mode.startswith("eval"):  # calling `train` may clear a cache
            layer.train(not layer.training)
        for t in parameters(layer):
            t.requires_grad_(mode != "frozen")
        if MODES[mode] == (OUTPUT,):
            with without_gradients(mode):
                found: Results = {OUTPUT: layer(x.detach())}
        else:
            found = results(layer, x, g)
        yield from self.right(found, {q: t for q, t in p.truth.items() if q in MODES[mode]})

    def passes(self, *problems: Problem) -> Iterator[Finding]:
        """One after another in a mode, then in the next."""
        few = ["train", "no_grad", "eval and inference_mode"]
        for mode, p in itertools.product(few if self.subject.short else TWICE, problems):
            yield from self.one_pass(p, mode)


MODES = {
    "train": QUANTITIES,
    "eval": QUANTITIES,
    "no_grad": (OUTPUT,),
    "inference_mode": (OUTPUT,),
    "eval and no_grad": (OUTPUT,),
    "eval and inference_mode": (OUTPUT,),
    "frozen": (OUTPUT, INPUT),
}
TWICE = [mode for mode in MODES if mode != "frozen"]


def without_gradients(mode: str) -> Any:
    return torch.inference_mode() if mode.endswith("inference_mode") else torch.no_grad()


def of(*words: Iterable[str], step: int = 1, full: int = 1) -> Callable[[Subject], Iterable[Any]]:
    """Each layer in each dtype with all words; or each full-th, of the short form each step-th."""
    return lambda subject: subject.thinned(step, LAYERS, DTYPES, *words, full=full)


@check("every mode first, then every other", cases=of(MODES, MODES, step=11), **EXACT)
def modes(subject: Subject, case: Case, dtype: str, first: str, then: str) -> Iterator[Finding]:
    trial = Trial(subject, case, dtype)
    for mode in (first, then, "train"):
        yield from trial.one_pass(mode=mode)


def _step(layer: nn.Conv2d, new: dict[str, Tensor]) -> None:
    """The update of torch.optim.SGD, without it: it imports PyTorch's compiler for a second."""
    with torch.no_grad():
        for name, t in layer.named_parameters():
            t.add_(t - new[name], alpha=-1)


def _copy(layer: nn.Conv2d, new: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, t in layer.named_parameters():
            t.copy_(new[name])


def _data(layer: nn.Conv2d, new: dict[str, Tensor]) -> None:
    for name, t in layer.named_parameters():
        t.data = new[name]


def _data_in_place(layer: nn.Conv2d, new: dict[str, Tensor]) -> None:
    for name, t in layer.named_parameters():
        t.data.copy_(new[name])  # does not count as a new version of t


def _new_parameters(layer: nn.Conv2d, new: dict[str, Tensor]) -> None:
    for name in dict(layer.named_parameters()):
        setattr(layer, name, nn.Parameter(new[name]))


CHANGES: dict[str, Callable[[nn.Conv2d, dict[str, Tensor]], Any]] = {
    "load_state_dict": lambda layer, new: layer.load_state_dict(new),
    "load_state_dict(assign=True)": lambda layer, new: layer.load_state_dict(new, assign=True),
    "add_, as by an optimizer": _step,
    "copy_ under no_grad": _copy,
    ".data =": _data,
    ".data.copy_": _data_in_place,
    "new Parameters": _new_parameters,
}


@check(
    "parameters changed between calls", cases=of(CHANGES, TWICE, TWICE, step=31, full=5), **EXACT
)
def changed_parameters(
    subject: Subject, case: Case, dtype: str, change: str, before: str, after: str
) -> Iterator[Finding]:
    trial = Trial(subject, case, dtype)
    yield from trial.one_pass(mode=before)
    CHANGES[change](trial.layer, trial.new_parameters(q := trial.problem(weights=1)))
    yield from trial.one_pass(q, after)


def _other_sizes(t: Trial) -> Iterator[Finding]:
    *batch, height, width = t.case.size
    sizes = [(*batch, height + 1, width), (*batch, height, width + 3), (7, height, width)]
    if t.case.padding and width != height:  # as many numbers, of another shape
        sizes.insert(0, (*batch, width, height))
    order = (t.case.size, *sizes, sizes[0], t.case.size)
    return t.passes(*(t.problem(size=size) for size in order))


def _other_numbers(t: Trial) -> Iterator[Finding]:
    return t.passes(*(t.problem(number) for number in (0, 1, 0)))


def _same_memory(t: Trial) -> Iterator[Finding]:
    """As a loader does that fills one buffer again and again."""
    q, (x, g) = t.problem(1), t.inputs()
    yield from t.right(results(t.layer, x, g), t.p.truth)
    x.data.copy_(t.subject.tensor(q.x))  # does not count as a change of version
    g.data.copy_(t.subject.tensor(q.g))
    yield from t.right(results(t.layer, x, g), q.truth)


def _outputs_first(t: Trial) -> Iterator[Finding]:
    yield from _interleaved(t, [(t.layer, t.p), (t.layer, t.problem(1))])


def _two_layers(t: Trial) -> Iterator[Finding]:
    others = [(t.subject.loaded(q, t.dtype), q) for q in (t.problem(1, 1), t.p)]
    yield from _interleaved(t, [(t.layer, t.p), *others])


def _interleaved(t: Trial, pairs: list[tuple[nn.Conv2d, Problem]]) -> Iterator[Finding]:
    """All outputs, then all gradients."""
    passes = [(layer, p, x := t.inputs(p)[0], layer(x)) for layer, p in pairs]
    for layer, p, x, y in passes:
        yield from t.differentiated(y, [x, *parameters(layer)], p)


def _moved(t: Trial) -> Iterator[Finding]:
    for dtype in (*DTYPES, *DTYPES[1::2]):
        t.dtype = getattr(torch, dtype)
        t.layer.to(t.dtype)
        yield from t.passes(t.p)


def _functional_call(t: Trial) -> Iterator[Finding]:
    q = t.problem(1, 1)
    for p, given in ((t.p, None), (q, t.new_parameters(q)), (t.p, None)):
        used: dict[str, Any] = given or dict(t.layer.named_parameters())
        (x, _), tensors = t.inputs(p), [tensor.requires_grad_() for tensor in used.values()]
        yield from t.differentiated(functional_call(t.layer, used, (x,)), [x, *tensors], p)


def _graph_twice(t: Trial) -> Iterator[Finding]:
    y = t.layer(x := t.inputs()[0])
    for p in (t.p, replace(t.p, g=t.problem(1).g), t.p):
        yield from t.differentiated(y, [x, *parameters(t.layer)], p, retain_graph=True)


def _accumulated(t: Trial) -> Iterator[Finding]:
    x, g = t.inputs()
    for _ in range(3):
        t.layer(x).backward(g)
    expected = {q: v * (1 if q == OUTPUT else 3) for q, v in t.p.truth.items()}
    yield from t.after_backward(x, t.layer(x), expected)


def _input_changed(t: Trial) -> Iterator[Finding]:
    """Between forward and backward: autograd notices, or the backward no longer needs it."""
    leaf, g = t.inputs()
    x = leaf * 1
    y = t.layer(x)
    x.detach().zero_()  # detached from the graph, and seen by its version counter all the same
    with contextlib.suppress(RuntimeError):
        y.backward(g)
        yield from t.after_backward(leaf, y, t.p.truth)


def _output_changed(t: Trial) -> Iterator[Finding]:
    """As by ReLU(inplace=True), before the backward."""
    x, g = t.inputs()
    g = g * t.subject.tensor(abs(t.p.truth[OUTPUT]) > 0.5)  # an error may have any sign
    (y := t.layer(x).relu_()).backward(g)
    output = t.p.truth[OUTPUT]
    expected = replace(t.p, g=t.p.g * (output > 0)).truth | {OUTPUT: output.clip(0)}
    yield from t.after_backward(x, y, expected)


def _many_calls(t: Trial) -> Iterator[Finding]:
    """Ten outputs are kept, so none may be in the memory of another; and one that tries out several
    ways in its first calls has decided."""
    problems, made = [t.problem(i) for i in range(7)], []
    for number in range(30):
        p = problems[number % 7]
        x, g = t.inputs(p)
        y = t.layer(x)
        made.append((p, y, *torch.autograd.grad(y, [x, *parameters(t.layer)], g)))
        del made[:-10]
    for p, *tensors in made:
        yield from t.right(dict(zip(p.truth, tensors, strict=True)), p.truth)


def _many_outputs(t: Trial) -> Iterator[Finding]:
    problems = [t.problem(i) for i in range(7)]
    with torch.no_grad():
        made = [(p, t.layer(t.inputs(p)[0])) for p in problems * 2]
    for p, y in made:
        yield from t.right({OUTPUT: y}, {OUTPUT: p.truth[OUTPUT]})


def _other_options(t: Trial) -> Iterator[Finding]:
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


HISTORIES = {
    "after inputs of other sizes": _other_sizes,
    "after another input of the same size": _other_numbers,
    "after another input in the same memory": _same_memory,
    "two outputs before their gradients": _outputs_first,
    "layers of the same shape in turns": _two_layers,
    "after a move to other dtypes": _moved,
    "functional_call with other parameters": _functional_call,
    "gradients of one output several times": _graph_twice,
    "gradients accumulated": _accumulated,
    "the input changed before the backward": _input_changed,
    "the output changed before the backward": _output_changed,
    "thirty calls, ten outputs kept": _many_calls,
    "fourteen outputs without gradients": _many_outputs,
    "options changed after the first call": _other_options,
}


@check("nothing remembered", cases=of(HISTORIES, step=3), **EXACT)
def history(subject: Subject, case: Case, dtype: str, name: str) -> Iterator[Finding]:
    yield from HISTORIES[name](Trial(subject, case, dtype))


# Layouts: each gives a tensor of the same shape and values; around it in memory are NaNs, that
# spoil the result of whoever reads there. The expanded ones change the values.


def _every_second(t: Tensor) -> Tensor:
    wide = t.new_full([2 * size for size in t.shape], torch.nan)
    return wide[(slice(1, None, 2),) * t.dim()].copy_(t)


def _cut_out(t: Tensor) -> Tensor:
    wide = t.new_full([size + 2 for size in t.shape], torch.nan)
    return wide[(slice(1, -1),) * t.dim()].copy_(t)


def _with_offset(t: Tensor) -> Tensor:
    flat = t.new_full([t.numel() + 7], torch.nan)
    return flat[5:-2].view(t.shape).copy_(t)


def _reversed(t: Tensor) -> Tensor:
    order = tuple(reversed(range(t.dim())))
    return t.permute(order).contiguous().permute(order)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "every second element": _every_second,
    "cut out of a larger one": _cut_out,
    "with an offset": _with_offset,
    "expanded from the first": lambda t: t[:1].expand(t.shape),
    "channels_last": lambda t: t.movedim(-3, -1).contiguous().movedim(-1, -3),
    "channels_last, with an offset": lambda t: _with_offset(t.movedim(-3, -1)).movedim(-1, -3),
    "transposed": lambda t: t.mT.contiguous().mT,
    "dimensions in reverse": _reversed,
    "expanded columns": lambda t: t[..., :1].expand(t.shape),
    "expanded from a number": lambda t: t[(slice(1),) * t.dim()].expand(t.shape),  # .sum()'s
}
TENSORS = {"input": "x", "weight": "w", "output gradient": "g", "bias": "b", "all but bias": "xwg"}
WIDE = [
    Case(32, 40, 1, (2, 4, 5)),
    Case(64, 32, 3, (2, 5, 6), padding=1),
    Case(40, 40, 3, (2, 6, 7), padding=1, groups=40),
]


def _layouts(subject: Subject) -> Iterator[tuple]:
    wide = subject.thinned(7, WIDE, DTYPES[::3], LAYOUTS, TENSORS)
    alone = subject.thinned(11, LAYERS, DTYPES, LAYOUTS, [*TENSORS][:-1])
    together = subject.thinned(3, LAYERS, DTYPES, LAYOUTS, [*TENSORS][-1:])
    for case, dtype, layout, tensor in itertools.chain(alone, together, wide):
        if tensor != "bias" or (case.bias and layout in [*LAYOUTS][:4]):
            yield case, dtype, layout, tensor


@check("memory formats and strides", cases=_layouts, **EXACT)
def strides(
    subject: Subject, case: Case, dtype: str, layout: str, tensor: str
) -> Iterator[Finding]:
    p = (trial := Trial(subject, case, dtype)).p
    names = [name for name in "xwgb" if getattr(p, name) is not None]
    given = {name: subject.tensor(getattr(p, name), trial.dtype) for name in names}
    for name in TENSORS[tensor]:
        given[name] = LAYOUTS[layout](given[name])
    p = p.with_(**{name: array(t) for name, t in given.items()})
    trial.layer.weight = nn.Parameter(given["w"])
    if "b" in given:
        trial.layer.bias = nn.Parameter(given["b"])
    yield from trial.right(results(trial.layer, given["x"], given["g"]), p.truth)
    with torch.no_grad():
        y = trial.layer(given["x"])
    yield from trial.right({OUTPUT: y}, {OUTPUT: p.truth[OUTPUT]})
    if tensor in ("output gradient", "bias"):
        text = f"the output is not contiguous: strides {y.stride()} for shape {(*y.shape,)}"
        yield Finding(float(not y.is_contiguous()), text)


@check("nothing changed in place", cases=of())
def in_place(subject: Subject, case: Case, dtype: str) -> Iterator[Finding]:
    layer = (trial := Trial(subject, case, dtype)).layer
    x, g = trial.inputs()
    tensors = {"input": x, "output gradient": g, **dict(layer.named_parameters())}
    before = {name: t.detach().clone() for name, t in tensors.items()}

    def changed(by: str) -> Iterator[Finding]:
        for name, t in tensors.items():
            yield Finding(float(not torch.equal(t, before[name])), f"{by} changes the {name}")

    for no_gradients in (torch.no_grad, torch.inference_mode):
        with no_gradients():
            layer(x)
        yield from changed(f"a forward under {no_gradients.__name__}")
    y = layer(x)
    yield from changed("the forward")
    after = y.detach().clone()
    y.backward(g)
    yield from changed("the backward")
    yield Finding(float(not torch.equal(y, after)), "the backward changes the output")


@check("results in memory of their own", cases=of())
def shared(subject: Subject, case: Case, dtype: str) -> Iterator[Finding]:
    """Whoever works in place on a result, as activations and optimizers do, changes no other."""
    layer = (trial := Trial(subject, case, dtype)).layer
    x, g = trial.inputs()
    inputs = {"input": x, **dict(layer.named_parameters())}
    there: dict[str, Tensor] = {**inputs, "output gradient": g}
    for call in ("", " of the second call"):
        y = layer(x)
        gradients = torch.autograd.grad(y, list(inputs.values()), g)
        made = {f"gradient of the {name}": t for name, t in zip(inputs, gradients, strict=True)}
        for name, t in {"output": y, **made}.items():
            for other, u in there.items():
                same = t.untyped_storage().data_ptr() == u.untyped_storage().data_ptr()
                yield Finding(float(same), f"{name}{call} shares memory with the {other}")
            there[name] = t


@check("nothing kept after a call", cases=of(TWICE, step=17, full=5))
def released(subject: Subject, case: Case, dtype: str, mode: str) -> Iterator[Finding]:
    """Inputs, outputs and the layer are freed, and tensors do not grow in number."""
    gc.freeze()  # what was there before is not looked at again
    try:
        trial, made, counts = Trial(subject, case, dtype), [], []
        p = trial.p
        for number in range(34):  # from the tenth on of other sizes each time
            if number > 9:
                p = trial.problem(size=(*case.size[:-1], case.size[-1] + number))
            x, g = trial.inputs(p)
            if MODES[mode] == (OUTPUT,):
                with without_gradients(mode):
                    y = trial.layer(x)
            else:
                y = trial.layer.train(mode == "train")(x)
                y.backward(g)
            made += [weakref.ref(x), weakref.ref(y)]
            del x, g, y
            counts.append(sum(issubclass(type(o), Tensor) for o in gc.get_objects()))
        if any(ref() is not None for ref in made):
            gc.collect()
        alive = sum(ref() is not None for ref in made)
        yield Finding(float(alive), f"keeps {alive} inputs and outputs of 34 calls")
        grown = counts[9] - counts[3]
        yield Finding(float(grown > 0), f"six calls leave {grown} tensors")
        grown = counts[-1] - counts[-13]
        yield Finding(float(grown > 8), f"twelve calls with inputs of other sizes leave {grown}")
        last = weakref.ref(trial.layer)
        del trial
        gc.collect()
        yield Finding(float(last() is not None), "a layer that is not used any more is kept")
    finally:
        gc.unfreeze()


def _threads(t: Trial, count: int) -> Iterator[Finding]:
    torch.set_num_threads(count)
    yield from t.one_pass()


def _two_threads(t: Trial, calls: int = 4, gradients: bool = True) -> Iterator[Finding]:
    """One layer called by two threads."""
    problems = [t.problem(1), t.p] * calls
    inputs = [t.inputs(q) for q in problems]

    def call(x: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        with torch.set_grad_enabled(gradients):
            y = t.layer(x)
        return (y, *torch.autograd.grad(y, [x, *parameters(t.layer)], g)) if gradients else (y,)

    with ThreadPoolExecutor(2) as threads:
        outputs = list(threads.map(call, *zip(*inputs, strict=True)))
    for q, tensors in zip(problems, outputs, strict=True):
        found: Results = dict(zip(q.truth, tensors, strict=False))
        yield from t.right(found, {name: q.truth[name] for name in found})


def _backward_elsewhere(t: Trial) -> Iterator[Finding]:
    x, g = t.inputs()
    y = t.layer(x)
    with ThreadPoolExecutor(1) as threads:
        threads.submit(y.backward, g).result()
    yield from t.after_backward(x, y, t.p.truth)


THREADS: dict[str, Callable[[Trial], Iterator[Finding]]] = {
    "in two threads": _two_threads,
    "in two threads without gradients": lambda t: _two_threads(t, 20, gradients=False),
    "backward in another thread": _backward_elsewhere,
    "with 1 intra-op thread": lambda t: _threads(t, 1),
    "with 2 intra-op threads": lambda t: _threads(t, 2),
    "with 3 intra-op threads": lambda t: _threads(t, 3),
}
LARGER = [
    Case(3, 8, 3, (16, 20, 21), padding=1),
    Case(8, 8, 3, (16, 12, 12), stride=2, groups=8),
    Case(16, 16, 1, (16, 16, 16), bias=False),
    Case(6, 4, 5, (6, 32, 33), padding=2),
]


def _threads_of(subject: Subject) -> Iterator[tuple]:
    yield from subject.thinned(11, LAYERS, DTYPES, THREADS)
    yield from itertools.product(LARGER, ["float32"], THREADS)


@check("threads", cases=_threads_of, **EXACT)
def threads(subject: Subject, case: Case, dtype: str, word: str) -> Iterator[Finding]:
    before = torch.get_num_threads()
    try:
        yield from THREADS[word](Trial(subject, case, dtype))
    finally:
        torch.set_num_threads(before)


@check("the same bits, called again", cases=of())
def repeated(subject: Subject, case: Case, dtype: str) -> Iterator[Finding]:
    """Whatever the seed, and in evaluation mode as well."""
    if subject.device.type != "cpu" and case.padding_mode in ("reflect", "replicate"):
        return  # PyTorch adds up gradients of such a padding in any order on a GPU
    layer = subject.loaded(p := Problem.normal(case, subject.seed), getattr(torch, dtype))
    x, g = subject.inputs(p, layer.weight.dtype)
    first = truth_of(results(layer, x, g))
    torch.manual_seed(subject.seed + 1)
    for mode in (True, False, True):
        for quantity, t in truth_of(results(layer.train(mode), x, g)).items():
            same = np.array_equal(t, first[quantity])
            yield Finding(float(not same), f"{quantity} has other bits")


SETTINGS = """
get_default_dtype get_default_device get_num_threads is_grad_enabled is_inference_mode_enabled
is_anomaly_enabled are_deterministic_algorithms_enabled get_float32_matmul_precision
backends.cudnn.enabled backends.cudnn.benchmark backends.cudnn.deterministic
backends.cudnn.allow_tf32 backends.mkldnn.enabled backends.mkldnn.deterministic
"""


def _state() -> dict[str, Any]:
    """Global settings that a layer might change."""
    values = {f"torch.{name}": operator.attrgetter(name)(torch) for name in SETTINGS.split()}
    return {
        **{name: str(value() if callable(value) else value) for name, value in values.items()},
        "autocast": (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")),
        # As text: where denormals are flushed, a comparison takes them for zero as well.
        "denormal numbers": str(float(torch.tensor(1e-310, dtype=torch.float64) * 1.0)),
        "numpy's handling of errors": np.geterr(),
    }


def _generators() -> dict[str, Any]:
    return {
        "torch's random numbers": torch.get_rng_state().tolist(),
        "numpy's random numbers": str(np.random.get_state()),  # noqa: NPY002
        "Python's random numbers": random.getstate(),
    }


@check("global state left alone", cases=lambda s: s.thinned(5, [*LAYERS, *LARGER], DTYPES))
def settings(subject: Subject, case: Case, dtype: str) -> Iterator[Finding]:
    """From before a layer is made until it is dropped. nn.Conv2d may print and warn, too; what is
    logged, as torch.compile does, is no fault."""

    def use(backend: Callable[..., nn.Conv2d]) -> tuple[set[str], list[str]]:
        text = io.StringIO()
        with (
            warnings.catch_warnings(record=True) as warned,
            contextlib.redirect_stdout(text),
            contextlib.redirect_stderr(text),
        ):
            warnings.simplefilter("always")
            before = _state()
            trial = Trial(replace(subject, backend=backend), case, dtype)
            before |= _generators()
            for mode in ["train"] * 4 + ["eval and no_grad"] * 4:  # some try out ways at first
                list(trial.one_pass(mode=mode))
            with contextlib.suppress(Exception):
                trial.layer(torch.zeros(1, case.in_channels + 1, 9, 9))
            del trial
            gc.collect(0)
            now = {**_state(), **_generators()}
        changed = [f"changes {name}" for name, value in before.items() if now[name] != value]
        said = {f"warns: {w.message}".split("\n")[0] for w in warned}
        return said | ({f"prints {text.getvalue()[:40]!r}"} if text.getvalue() else set()), changed

    threads, logged = torch.get_num_threads(), logging.root.manager.disable
    torch.set_num_threads(2)  # so that a change to 1 shows
    logging.disable()
    try:
        said, changed = use(subject.backend)
        allowed = use(nn.Conv2d)[0] if said else set()
    finally:
        torch.set_num_threads(threads)
        logging.disable(logged)
    for words in [*changed, *(said - allowed)]:
        yield Finding(1.0, words)
    yield Finding(0.0, "")


SUBSETS = [
    *("nothing", INPUT, WEIGHT, BIAS),
    *(f"{INPUT} and {WEIGHT}", f"{INPUT} and {BIAS}", f"{WEIGHT} and {BIAS}"),
]


@check("gradients only where asked for", cases=of(SUBSETS, step=3), **EXACT)
def asked(subject: Subject, case: Case, dtype: str, needs: str) -> Iterator[Finding]:
    layer = (trial := Trial(subject, case, dtype)).layer
    x, g = trial.inputs()
    tensors = {INPUT: x, **dict(zip((WEIGHT, BIAS), parameters(layer), strict=False))}
    for quantity, t in tensors.items():
        t.requires_grad_(quantity in needs)
    y = layer(x)
    right = any(t.requires_grad for t in tensors.values())
    yield Finding(float(y.requires_grad != right), f"the output's requires_grad is {not right}")
    if right:
        y.backward(g)
    for quantity, t in tensors.items():
        if quantity not in needs:
            yield Finding(float(t.grad is not None), f"there is a {quantity} that nobody asked for")
    truth = {q: t for q, t in trial.p.truth.items() if q == OUTPUT or q in needs}
    yield from trial.after_backward(x, y, truth)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            y = layer(x)
        text = f"the output under {mode.__name__} requires a gradient"
        yield Finding(float(y.requires_grad), text)
