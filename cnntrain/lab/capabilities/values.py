"""Number types, and inputs out of the ordinary."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, distributed, nn
from torch.autograd import gradcheck
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh
from torch.testing import assert_close

from cnntrain.lab.capabilities.twins import (
    OPTIONS,
    Backend,
    Cannot,
    call,
    function_and_inputs,
    gradients,
    parameters_of,
    twins,
)

HALVES = (torch.bfloat16, torch.float16)
ROUGHLY = 2**-6  # a few roundings in bfloat16, whose own is 2^-9


def autocast(backend: Backend) -> None:
    for dtype in HALVES:
        ours, reference, x = twins(backend, torch.float32)
        given = []
        for conv in (ours, reference):
            leaf = x.clone().requires_grad_()
            with torch.autocast("cpu", dtype):
                low = conv(leaf)
                with torch.autocast("cpu", enabled=False):
                    full = conv(leaf)
                loss = low.float().square().sum() + full.square().sum()
                loss.backward()  # inside, where a product in float32 would be cast
            given.append([low, full, leaf.grad, *(p.grad for p in conv.parameters())])
        assert given[0][0].dtype == dtype, f"{given[0][0].dtype} under autocast to {dtype}"
        full, exact = given[0][1], given[1][1]
        assert_close(full, exact, rtol=0, atol=1e-5 * exact.abs().max().item())
        for mine, theirs in zip(*given, strict=True):
            assert_close(mine, theirs, rtol=ROUGHLY, atol=ROUGHLY * theirs.abs().max().item())


def half_precision(backend: Backend) -> None:
    for dtype in HALVES:
        ours, reference, x = twins(backend, dtype)
        exact = gradients(reference.double(), x.double(), *reference.parameters())
        for mine, theirs in zip(gradients(ours, x, *ours.parameters()), exact, strict=True):
            assert mine.dtype == dtype, f"{mine.dtype} out of {dtype}"
            atol = ROUGHLY * theirs.abs().max().item()
            assert_close(mine.double(), theirs, rtol=ROUGHLY, atol=atol)


def complex_numbers(backend: Backend) -> None:
    ours, reference, x = twins(backend, torch.complex128)
    mine = gradients(ours, x, *ours.parameters())
    assert_close(mine, gradients(reference, x, *reference.parameters()))
    function, inputs = function_and_inputs(ours, x[:1])
    assert gradcheck(function, inputs, raise_exception=False), "not what finite differences give"


def integers(backend: Backend) -> None:
    ours, reference, x = twins(backend)
    whole = {name: (9 * value).long() for name, value in parameters_of(reference).items()}
    mine, theirs = (call(conv)(whole, (9 * x).long()) for conv in (ours, reference))
    assert_close(mine, theirs, rtol=0, atol=0)


def padding_modes(backend: Backend) -> None:
    modes = "zeros", "reflect", "replicate", "circular"
    for mode, padding in itertools.product(modes, (1, (0, 2), "same")):
        ours, reference, x = twins(
            backend, kernel_size=(2, 3), stride=1, padding=padding, padding_mode=mode
        )
        assert_close(gradients(ours, x), gradients(reference, x))


def unbatched_and_empty(backend: Backend) -> None:
    ours, reference, x = twins(backend)
    for some in (x[0], x[:0]):
        mine = gradients(ours, some, *ours.parameters())
        assert_close(mine, gradients(reference, some, *reference.parameters()))


def any_strides(backend: Backend) -> None:
    ours, reference, x = twins(backend)
    for same_size in (
        x.contiguous(memory_format=torch.channels_last),
        x.permute(2, 1, 0, 3),
        x[:1, :1].expand(2, 4, -1, -1),
        torch.stack([x, -x], dim=-1)[..., 1],
    ):
        assert_close(ours(same_size), reference(same_size))


def channels_last_output(backend: Backend) -> None:
    ours, reference, x = twins(backend)
    y = ours(x.contiguous(memory_format=torch.channels_last))
    assert_close(y, reference(x))
    if not y.is_contiguous(memory_format=torch.channels_last):
        raise Cannot(f"strides {y.stride()} for size {list(y.shape)}")


def shapes_without_numbers(backend: Backend) -> None:
    ours, reference, x = twins(backend)
    size = reference(x).shape
    assert ours.to("meta")(x.to("meta")).shape == size
    with torch._subclasses.FakeTensorMode():
        assert backend(**OPTIONS)(torch.empty(x.shape)).shape == size


def subclasses(backend: Backend) -> None:
    class Image(Tensor):
        pass

    ours, reference, x = twins(backend)
    y = ours(x.as_subclass(Image))
    assert_close(y.as_subclass(Tensor), reference(x))
    if type(y) is not Image:
        raise Cannot(f"a {type(y).__name__} out of an Image")


def distributed_tensors(backend: Backend) -> None:
    ours, reference, x = twins(backend)
    expected = reference(x)
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for name, value in list(ours.named_parameters()):
            replicated = distribute_tensor(value.detach(), mesh, [Replicate()])
            ours.register_parameter(name, nn.Parameter(replicated))
        y = ours(distribute_tensor(x, mesh, [Shard(0)]))
        assert_close(y.full_tensor(), expected)
    finally:
        distributed.destroy_process_group()
