"""What a convolution can do beside computing an output: the list, and the table of who can.

Each probe really tries one thing on a backend, which is anything called like ``nn.Conv2d``, and
compares the numbers with what ``nn.Conv2d`` gives in the plainest way: one call at a time, eagerly.
It returns where the backend can, raises AssertionError where a number is wrong, and anything else
where the backend cannot.

    python -m cnntrain.lab.capabilities                     # prints the table
    python -m cnntrain.lab.capabilities docs/convolutions.md    # writes it there

and ``table({"mine": MyConv2d})`` is that of a class of one's own.
"""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Callable, Mapping

import torch

from cnntrain.conv import BACKENDS
from cnntrain.lab.capabilities import derivatives, programs, values
from cnntrain.lab.capabilities.twins import Backend

CAPABILITIES: dict[str, Callable[[Backend], None]] = {
    "first derivatives, in any of input, weight and bias": derivatives.first_derivatives,
    "second derivatives": derivatives.second_derivatives,
    "`jvp`, `jacfwd`": derivatives.forward_mode,
    "`jacrev`, `hessian`": derivatives.hessians,
    "`autograd.grad(is_grads_batched=True)`": derivatives.batched_gradients,
    "`vmap` over inputs: any dimension, in chunks, nested": derivatives.vmap_inputs,
    "`vmap` over weights, biases, both, with inputs, nested": derivatives.vmap_weights,
    "`vmap` of `grad`: each sample's, each model's": derivatives.vmap_of_grad,
    "`torch.compile(fullgraph=True)`, forward and backward": programs.compile_whole,
    "`torch.compile` of `vmap`, of `jvp`": programs.compile_transforms,
    "`torch.export`": programs.export,
    "`torch.export` for batches of 1 to 64": programs.export_any_batch,
    "`torch.export` for any batch, height and width": programs.export_any_size,
    "`torch.jit.trace`, saved": programs.trace,
    "`torch.fx.symbolic_trace`": programs.symbolic_trace,
    "autocast to bfloat16 and float16": values.autocast,
    "bfloat16 and float16": values.half_precision,
    "complex numbers": values.complex_numbers,
    "integers": values.integers,
    "every padding mode, `'same'`": values.padding_modes,
    "one image without batch, an empty batch": values.unbatched_and_empty,
    "inputs of any strides": values.any_strides,
    "`channels_last` outputs for such inputs": values.channels_last_output,
    "tensor subclasses": values.subclasses,
    "`DTensor`": values.distributed_tensors,
    "`meta` and fake tensors": values.shapes_without_numbers,
    "`use_deterministic_algorithms`, bitwise the same each time": programs.repeatable,
    "`deepcopy`, `pickle`, `torch.save`": programs.copies,
    "keeps input and weight for the backward, no more": programs.kept_for_backward,
    "`checkpoint`, saved-tensor hooks": programs.checkpointing,
    "`no_grad`, `inference_mode`": programs.without_gradients,
    "hooks of modules and tensors": programs.hooks,
    "`weight_norm`, `spectral_norm`": programs.reparametrised,
}

# Why those that are no operator of PyTorch cannot, and what to do instead.
LIMITS: dict[Callable[[Backend], None], str] = {
    derivatives.batched_gradients: "passes by custom functions; use `torch.func.vjp` and `vmap`",
    programs.compile_transforms: "dynamo takes no custom function there; works uncompiled",
    programs.export_any_size: "a loop over output positions is part of the graph",
    values.distributed_tensors: "PyTorch has no sharding rule for `unfold`; use `native`",
    programs.trace: "TorchScript cannot save Python; use `torch.export`",
    programs.symbolic_trace: "sizes are checked; make the class a leaf of the tracer",
    values.channels_last_output: "outputs are contiguous",
}


def attempt(probe: Callable[[Backend], None], backend: Backend) -> str:
    """'' where the backend can, or in one line why it cannot.

    Raises:
        AssertionError: a number is wrong.
    """
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            probe(backend)
    except AssertionError:
        raise
    except Exception as error:
        return textwrap.shorten(f"{type(error).__name__}: {error}", 100).replace("|", r"\|")
    return ""


def table(backends: Mapping[str, Backend] = BACKENDS) -> str:
    """Who can what, in Markdown: a row for each capability, a column for each backend.

    Raises:
        AssertionError: a number is wrong.
    """
    rows = [["", *(f"`{name}`" for name in backends), "why not"], ["---"] * (len(backends) + 2)]
    for name, probe in CAPABILITIES.items():
        answers = [attempt(probe, backend) for backend in backends.values()]
        why = LIMITS.get(probe, max(answers)) if any(answers) else ""
        rows.append([name, *("no" if answer else "yes" for answer in answers), why])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)
