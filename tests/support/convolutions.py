"""The shipped convolutions, a grid of their options, and tensors for them."""

import itertools

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from cnntrain.conv import BACKENDS, Im2colConv2d, NaiveConv2d

OURS = [Im2colConv2d, NaiveConv2d]
every_backend = pytest.mark.parametrize("backend", list(BACKENDS.values()), ids=list(BACKENDS))
our_backend = pytest.mark.parametrize("backend", OURS, ids=["im2col", "naive"])

STRIDES = [1, 2, (2, 3)]
PADDINGS = [0, (1, 2), "same", "valid"]
DILATIONS = [1, (2, 1), (1, 2), 2]
GROUPS = [1, 2, 4]
KERNELS = [1, 3, (2, 3), (3, 1), 2]
GRID = [
    {"stride": s, "padding": p, "dilation": d, "groups": g, "kernel_size": k}
    for s, p, d, g, k in itertools.product(STRIDES, PADDINGS, DILATIONS, GROUPS, KERNELS)
    if p != "same" or s == 1
]


def randn(*size: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*size, generator=generator, dtype=dtype)


def layer_like(
    backend: type[nn.Conv2d], conv: nn.Conv2d, *args: object, **options: object
) -> nn.Conv2d:
    other = backend(*args, **options, dtype=conv.weight.dtype)
    other.load_state_dict(conv.state_dict())
    return other


class OperatorNames(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func._schema.name)
        return func(*args, **(kwargs or {}))
