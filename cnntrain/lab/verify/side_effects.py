"""Side effects and memory of a convolution: strides, aliasing, leaks, threads, global settings."""

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
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cnntrain.lab.verify.cases import OUTPUT, Case, listed
from cnntrain.lab.verify.check import Candidate, CaseError, Check, Errors, array, results
from cnntrain.lab.verify.layers import DTYPES, MODES, UNFROZEN, IntegerLayer, layer_check

SMALL_LAYERS, WIDE_LAYERS, THREADED_LAYERS = map(listed, ("small", "wide", "threaded"))

# Layouts: each makes a tensor of the same shape and values, with NaN around it in memory, so that
# reading there makes the result NaN. The expanded ones change the values.


def _part_of(t: Tensor, size: list[int], part: slice) -> Tensor:
    return t.new_full(size, torch.nan)[(part,) * t.dim()].copy_(t)


def _with_offset(t: Tensor) -> Tensor:
    flat = t.new_full([t.numel() + 7], torch.nan)
    return flat[5:-2].view(t.shape).copy_(t)


def _reversed(t: Tensor) -> Tensor:
    order = tuple(reversed(range(t.dim())))
    return t.permute(order).contiguous().permute(order)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "every second element": lambda t: _part_of(t, [2 * n for n in t.shape], slice(1, None, 2)),
    "cut out of a larger one": lambda t: _part_of(t, [n + 2 for n in t.shape], slice(1, -1)),
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


def _layouts(candidate: Candidate) -> Iterator[tuple]:
    wide = candidate.thinned(7, WIDE_LAYERS, DTYPES[::3], LAYOUTS, TENSORS)
    alone = candidate.thinned(11, SMALL_LAYERS, DTYPES, LAYOUTS, [*TENSORS][:-1])
    together = candidate.thinned(3, SMALL_LAYERS, DTYPES, LAYOUTS, [*TENSORS][-1:])
    for case, dtype, layout, tensor in itertools.chain(alone, together, wide):
        if tensor != "bias" or (case.bias and layout in [*LAYOUTS][:4]):
            yield case, dtype, layout, tensor


@layer_check("memory formats and strides", cases=_layouts)
def strides(t: IntegerLayer, layout: str, tensor: str) -> Errors:
    names = [name for name in "xwgb" if getattr(t.p, name) is not None]
    given = {name: t.candidate.tensor(getattr(t.p, name), t.dtype) for name in names}
    for name in TENSORS[tensor]:
        given[name] = LAYOUTS[layout](given[name])
    values: dict[str, Any] = {name: array(tensor) for name, tensor in given.items()}
    p = replace(t.p, **values)
    t.layer.weight = nn.Parameter(given["w"])
    if "b" in given:
        t.layer.bias = nn.Parameter(given["b"])
    yield from t.compare(results(t.layer, given["x"], given["g"]), p)
    with torch.no_grad():
        y = t.layer(given["x"])
    yield from t.compare({OUTPUT: y}, p, OUTPUT)
    if tensor in ("output gradient", "bias"):
        text = f"the output is not contiguous: strides {y.stride()} for shape {(*y.shape,)}"
        yield CaseError(not y.is_contiguous(), text)


@layer_check("inputs not modified", exact=False)
def in_place(t: IntegerLayer) -> Errors:
    layer, (x, g) = t.layer, t.inputs()
    tensors = {"input": x, "output gradient": g, **dict(layer.named_parameters())}
    before = {name: values.detach().clone() for name, values in tensors.items()}

    def changed(by: str) -> Errors:
        for name, values in tensors.items():
            same = torch.equal(values, before[name])
            yield CaseError(not same, f"{by} changes the {name}")

    for no_gradients in (torch.no_grad, torch.inference_mode):
        with no_gradients():
            layer(x)
        yield from changed(f"a forward under {no_gradients.__name__}")
    y = layer(x)
    yield from changed("the forward")
    after = y.detach().clone()
    y.backward(g)
    yield from changed("the backward")
    yield CaseError(not torch.equal(y, after), "the backward changes the output")


@layer_check("no tensors kept after a call", UNFROZEN, step=17, full=5, exact=False)
def released(t: IntegerLayer, mode: str) -> Errors:
    """Inputs, outputs and the layer are freed, and the number of tensors does not grow."""
    gc.freeze()  # exclude older objects
    try:
        t.layer = t.candidate.layer(t.p, t.dtype)
        made, counts, p, size = [], [], t.p, t.case.size
        for number in range(34):  # from the tenth on with another size each time
            if number > 9:
                p = t.problem(size=(*size[:-1], size[-1] + number))
            x, g = t.inputs(p)
            y = t.forward(x, mode)
            if MODES[mode] != (OUTPUT,):
                y.backward(g)
            made += [weakref.ref(x), weakref.ref(y)]
            del x, g, y
            counts.append(sum(issubclass(type(o), Tensor) for o in gc.get_objects()))
        if any(ref() is not None for ref in made):
            gc.collect()
        alive = sum(ref() is not None for ref in made)
        yield CaseError(alive, f"keeps {alive} inputs and outputs of 34 calls")
        grown = counts[9] - counts[3]
        yield CaseError(grown > 0, f"six calls leave {grown} tensors")
        grown = counts[-1] - counts[-13]
        yield CaseError(grown > 8, f"twelve calls with inputs of other sizes leave {grown}")
        last = weakref.ref(t.layer)
        del t
        gc.collect()
        yield CaseError(last() is not None, "the layer is kept after its last use")
    finally:
        gc.unfreeze()


def _intra_op_threads(t: IntegerLayer, count: int) -> Errors:
    torch.set_num_threads(count)
    yield from t.one_pass()


def _two_threads(t: IntegerLayer, calls: int = 4, gradients: bool = True) -> Errors:
    """One layer called by two threads."""
    problems = [t.problem(1), t.p] * calls
    inputs = [t.inputs(q) for q in problems]
    with ThreadPoolExecutor(2) as threads:
        futures = [threads.submit(t.call, x, g, gradients) for x, g in inputs]
        outputs = [future.result() for future in futures]
    for q, found in zip(problems, outputs, strict=True):
        yield from t.compare(found, q, *found)


def _backward_in_thread(t: IntegerLayer) -> Errors:
    x, g = t.inputs()
    y = t.layer(x)
    with ThreadPoolExecutor(1) as threads:
        threads.submit(y.backward, g).result()
    yield from t.compare(t.collected(x, y), t.p)


THREADS: dict[str, Callable[[IntegerLayer], Errors]] = {
    "in two threads": _two_threads,
    "in two threads without gradients": lambda t: _two_threads(t, 20, gradients=False),
    "backward in another thread": _backward_in_thread,
    **{f"intra-op threads: {n}": partial(_intra_op_threads, count=n) for n in (1, 2, 3)},
}


def _threaded(candidate: Candidate) -> Iterator[tuple]:
    yield from candidate.thinned(11, SMALL_LAYERS, DTYPES, THREADS)
    yield from itertools.product(THREADED_LAYERS, ["float32"], THREADS)


@layer_check("threads", cases=_threaded)
def threads(t: IntegerLayer, word: str) -> Errors:
    before = torch.get_num_threads()
    try:
        yield from THREADS[word](t)
    finally:
        torch.set_num_threads(before)


SETTINGS = """
get_default_dtype get_default_device get_num_threads is_grad_enabled is_inference_mode_enabled
is_anomaly_enabled are_deterministic_algorithms_enabled get_float32_matmul_precision
backends.cudnn.enabled backends.cudnn.benchmark backends.cudnn.deterministic
backends.cudnn.allow_tf32 backends.mkldnn.enabled backends.mkldnn.deterministic
"""


def _settings() -> dict[str, Any]:
    """Global settings that a layer might change."""
    values = {f"torch.{name}": operator.attrgetter(name)(torch) for name in SETTINGS.split()}
    return {
        **{name: str(value() if callable(value) else value) for name, value in values.items()},
        "autocast": (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")),
        # As text: where denormals are flushed, they compare equal to zero.
        "denormal numbers": str(float(torch.tensor(1e-310, dtype=torch.float64) * 1.0)),
        "numpy's handling of errors": np.geterr(),
    }


def _generators() -> dict[str, Any]:
    return {
        "torch's random numbers": torch.get_rng_state().tolist(),
        "numpy's random numbers": str(np.random.get_state()),  # noqa: NPY002
        "Python's random numbers": random.getstate(),
    }


@Check("global state unchanged", lambda c: c.thinned(5, SMALL_LAYERS + THREADED_LAYERS, DTYPES))
def global_state(candidate: Candidate, case: Case, dtype: str) -> Errors:
    """From the construction of a layer to its deletion. What nn.Conv2d prints or warns of is
    allowed; log messages, as those of torch.compile, are ignored."""
    threads, logged = torch.get_num_threads(), logging.root.manager.disable
    torch.set_num_threads(2)  # so that a change to 1 is seen
    logging.disable()
    try:
        effects = _effects(candidate, case, dtype)
        if effects:
            effects -= _effects(replace(candidate, backend=nn.Conv2d), case, dtype)
    finally:
        torch.set_num_threads(threads)
        logging.disable(logged)
    yield CaseError(bool(effects), "; ".join(sorted(effects)))


def _effects(candidate: Candidate, case: Case, dtype: str) -> set[str]:
    """Changed settings, drawn random numbers, warnings and printed text."""
    text = io.StringIO()
    with (
        warnings.catch_warnings(record=True) as warned,
        contextlib.redirect_stdout(text),
        contextlib.redirect_stderr(text),
    ):
        warnings.simplefilter("always")
        before = _settings()
        t = IntegerLayer(candidate, case, dtype)
        before |= _generators()
        for mode in ["train"] * 4 + ["eval and no_grad"] * 4:  # first calls may benchmark
            list(t.one_pass(mode=mode))
        with contextlib.suppress(Exception):
            t.layer(torch.zeros(1, case.in_channels + 1, 9, 9))
        del t
        gc.collect(0)
        now = {**_settings(), **_generators()}
    effects = {f"changes {name}" for name, value in before.items() if now[name] != value}
    effects |= {f"warns: {w.message}".split("\n")[0] for w in warned}
    return effects | ({f"prints {text.getvalue()[:40]!r}"} if text.getvalue() else set())
