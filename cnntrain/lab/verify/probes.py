"""Uses of a layer beside forward and backward: copies, hooks, autocast, padding modes.

A probe tries one use of a backend (anything called like ``nn.Conv2d``) and compares the numbers
with those of ``nn.Conv2d``. It raises AssertionError where a number is wrong, and another exception
where the backend does not support the use. Those here are required of any backend.
"""

from __future__ import annotations

import copy
import io
import itertools
import pickle
import textwrap
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.func import functional_call
from torch.nn.utils import parametrizations
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

Backend = Callable[..., nn.Conv2d]
Probe = Callable[[Backend], None]
Parameters = dict[str, Tensor]
# Height and width, groups and dilation all differ. The output is 2 x 2, because compilers unroll a
# loop over its positions.
OPTIONS: dict[str, Any] = {"in_channels": 4, "out_channels": 6, "kernel_size": (2, 3)}
OPTIONS |= {"stride": (1, 2), "dilation": (1, 2), "groups": 2}
HALF_TOLERANCE = 2**-6  # several roundings in bfloat16, whose unit roundoff is 2^-9
GRADCHECK_FAILED = "analytical and numerical gradients differ"


def layers_and_input(
    backend: Backend,
    dtype: torch.dtype = torch.float64,
    size: tuple[int, int] = (3, 7),
    **options: Any,
) -> tuple[nn.Conv2d, nn.Conv2d, Tensor]:
    """The backend's layer, an ``nn.Conv2d`` with equal weights, and an input (3, C, *size)."""
    generator = torch.Generator().manual_seed(0)

    def randn(*size: int) -> Tensor:
        values = torch.randn(size, generator=generator, dtype=torch.float64)
        return (torch.complex(values, values.flip(0)) if dtype.is_complex else values).to(dtype)

    layer, reference = (conv(**(OPTIONS | options)).to(dtype) for conv in (backend, nn.Conv2d))
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.copy_(randn(*parameter.shape))
    layer.load_state_dict(reference.state_dict())
    return layer, reference, randn(3, reference.in_channels, *size)


def gradients(function: Callable[[Tensor], Tensor], x: Tensor, *others: Tensor) -> list[Tensor]:
    """The output y, and the gradients of sum |y|^2 with respect to x and `others`."""
    x = x.detach().clone().requires_grad_()
    y = function(x)
    return [y, *torch.autograd.grad(y.abs().square().sum(), (x, *others))]


def functional(conv: nn.Conv2d) -> Callable[[Parameters, Tensor], Tensor]:
    """The layer as a function of its parameters and its input."""
    return lambda parameters, x: functional_call(conv, parameters, (x,))


def parameters_of(conv: nn.Conv2d) -> Parameters:
    return {name: value.detach() for name, value in conv.named_parameters()}


def for_gradcheck(conv: nn.Conv2d, x: Tensor) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """The layer as a function of tensors, and the tensors: arguments of ``gradcheck``."""
    parameters = parameters_of(conv)

    def function(x: Tensor, *values: Tensor) -> Tensor:
        return functional(conv)(dict(zip(parameters, values, strict=True)), x)

    return function, [t.clone().requires_grad_() for t in (x, *parameters.values())]


def by_keyword(backend: Backend) -> None:
    layer, reference, x = layers_and_input(backend)
    assert_close(layer(input=x), reference(x))


def first_derivatives(backend: Backend) -> None:
    for needs in itertools.product((True, False), repeat=3):
        layer, reference, x = layers_and_input(backend)
        results = []
        for conv in (layer, reference):
            leaves = [x.clone(), *conv.parameters()]
            for leaf, need in zip(leaves, needs, strict=True):
                leaf.requires_grad_(need)
            if any(needs):
                conv(leaves[0]).square().sum().backward()
            results.append([leaf.grad for leaf in leaves])
        for gradient, expected in zip(*results, strict=True):
            assert (gradient is None) == (expected is None), f"gradients for {needs} of (x, w, b)"
            if gradient is not None:
                assert_close(gradient, expected)
    function, inputs = for_gradcheck(layer, x)
    assert gradcheck(function, inputs, raise_exception=False), GRADCHECK_FAILED


def autocast(backend: Backend) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        layer, reference, x = layers_and_input(backend, torch.float32)
        results = []
        for conv in (layer, reference):
            leaf = x.clone().requires_grad_()
            with torch.autocast("cpu", dtype):
                low = conv(leaf)
                with torch.autocast("cpu", enabled=False):
                    full = conv(leaf)
                loss = low.float().square().sum() + full.square().sum()
                loss.backward()  # within autocast, which would cast a product in float32
            results.append([low, full, leaf.grad, *(p.grad for p in conv.parameters())])
        assert results[0][0].dtype == dtype, f"{results[0][0].dtype} under autocast to {dtype}"
        full, exact = results[0][1], results[1][1]
        assert_close(full, exact, rtol=0, atol=1e-5 * exact.abs().max().item())
        for value, expected in zip(*results, strict=True):
            atol = HALF_TOLERANCE * expected.abs().max().item()
            assert_close(value, expected, rtol=HALF_TOLERANCE, atol=atol)


def half_precision(backend: Backend) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        layer, reference, x = layers_and_input(backend, dtype)
        exact = gradients(reference.double(), x.double(), *reference.parameters())
        for value, expected in zip(gradients(layer, x, *layer.parameters()), exact, strict=True):
            assert value.dtype == dtype, f"{value.dtype} for {dtype}"
            atol = HALF_TOLERANCE * expected.abs().max().item()
            assert_close(value.double(), expected, rtol=HALF_TOLERANCE, atol=atol)


def padding_modes(backend: Backend) -> None:
    modes = "zeros", "reflect", "replicate", "circular"
    for mode, padding in itertools.product(modes, (1, (0, 2), "same")):
        layer, reference, x = layers_and_input(
            backend, kernel_size=(2, 3), stride=1, padding=padding, padding_mode=mode
        )
        assert_close(gradients(layer, x), gradients(reference, x))


def unbatched_and_empty(backend: Backend) -> None:
    layer, reference, x = layers_and_input(backend)
    for part in (x[0], x[:0]):
        expected = gradients(reference, part, *reference.parameters())
        assert_close(gradients(layer, part, *layer.parameters()), expected)


def any_strides(backend: Backend) -> None:
    layer, reference, x = layers_and_input(backend)
    for strided in (
        x.contiguous(memory_format=torch.channels_last),
        x.permute(2, 1, 0, 3),
        x[:1, :1].expand(2, 4, -1, -1),
        torch.stack([x, -x], dim=-1)[..., 1],
    ):
        assert_close(layer(strided), reference(strided))


def copies(backend: Backend) -> None:
    layer, reference, x = layers_and_input(backend)
    torch.save(layer, file := io.BytesIO())
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for other in (loaded, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(other) is type(layer), f"{type(other).__name__} from {type(layer).__name__}"
        assert_close(other(x), reference(x))


def checkpointing(backend: Backend) -> None:
    layer, reference, x = layers_and_input(backend)
    expected = gradients(reference, x, *reference.parameters())
    for reentrant in (True, False):
        y = checkpoint(layer, x.requires_grad_(), use_reentrant=reentrant)
        y.square().sum().backward()
        leaves = [x, *layer.parameters()]
        assert_close([y, *(leaf.grad for leaf in leaves)], expected)
        for leaf in leaves:
            leaf.grad = None
    with torch.autograd.graph.save_on_cpu():
        assert_close(gradients(layer, x, *layer.parameters()), expected)


def without_gradients(backend: Backend) -> None:
    layer, reference, x = layers_and_input(backend)
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            y = layer(x)
            assert not y.requires_grad, "the output requires grad"
            assert_close(y, reference(x))


def hooks(backend: Backend) -> None:
    layer, reference, x = layers_and_input(backend)

    def run(conv: nn.Conv2d) -> list[Tensor | None]:
        seen: list[Tensor | None] = []
        conv.register_forward_hook(lambda _module, _inputs, y: seen.append(y))
        conv.register_full_backward_hook(lambda _module, dx, dy: seen.extend((*dx, *dy)))
        conv.weight.register_hook(lambda g: 2 * g)
        conv(x.clone().requires_grad_()).square().sum().backward()
        return [*seen, conv.weight.grad]

    assert_close(run(layer), run(reference))


def parametrised(backend: Backend) -> None:
    for parametrise in (parametrizations.weight_norm, parametrizations.spectral_norm):
        layer, reference, x = layers_and_input(backend)
        for conv in (layer, reference):
            torch.manual_seed(0)  # spectral_norm starts from a random vector
            parametrise(conv)
        expected = gradients(reference, x, *reference.parameters())
        assert_close(gradients(layer, x, *layer.parameters()), expected)


REQUIRED: dict[str, Probe] = {  # by any training program: unsupported counts as a failure
    "`layer(input=x)`": by_keyword,
    "first derivatives, in any of input, weight and bias": first_derivatives,
    "autocast to bfloat16 and float16": autocast,
    "bfloat16 and float16": half_precision,
    "every padding mode, `'same'`": padding_modes,
    "one image without batch, an empty batch": unbatched_and_empty,
    "inputs of any strides": any_strides,
    "`deepcopy`, `pickle`, `torch.save`": copies,
    "`checkpoint`, saved-tensor hooks": checkpointing,
    "`no_grad`, `inference_mode`": without_gradients,
    "hooks of modules and tensors": hooks,
    "`weight_norm`, `spectral_norm`": parametrised,
}


def attempt(probe: Probe, backend: Backend) -> str:
    """Run a probe: '' if the backend supports the use, else the reason in one line.

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
