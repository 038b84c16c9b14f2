"""Faults of strides, memory, state and interface, each with the line that reports it."""

import copy
from typing import Any

import numpy as np
import torch
from faults import Correct, Faults, KernelPositions
from torch import nn

from cnntrain.conv import Geometry

faults = Faults()


# Memory.


def in_one_piece(t: torch.Tensor) -> torch.Tensor:
    """The elements of the storage in order, ignoring the strides."""
    size, strides = t.shape, torch.empty(t.shape, device="meta").stride()
    last = sum((n - 1) * s for n, s in zip(size, strides, strict=True)) if t.numel() else -1
    room = t.untyped_storage().nbytes() // t.element_size() - t.storage_offset()
    return t.as_strided(size, strides) if last < room else t.contiguous()


@faults.caught_by("memory formats and strides")
class InputStridesIgnored(KernelPositions):
    def forward(self, x, w, geometry):
        return super().forward(in_one_piece(x), w, geometry)


@faults.caught_by("memory formats and strides")
class WeightStridesIgnored(KernelPositions):
    def forward(self, x, w, geometry):
        return super().forward(x, in_one_piece(w), geometry)


@faults.caught_by("memory formats and strides")
class GradientStridesIgnored(KernelPositions):
    def grad_weight(self, g, x, kernel_size, geometry):
        return super().grad_weight(in_one_piece(g), x, kernel_size, geometry)


@faults.caught_by("memory formats and strides")
class StorageOffsetIgnored(KernelPositions):
    def forward(self, x, w, geometry):
        return super().forward(x.as_strided(x.shape, x.stride(), 0), w, geometry)


@faults.caught_by("memory formats and strides")
class ExpandedGradientIsANumber(KernelPositions):
    """The gradient of .sum(), expanded from one number, is added only once."""

    def grad_input(self, g, w, input_size, geometry):
        if g.stride() == (0, 0, 0, 0):
            g = torch.zeros_like(g).index_fill(0, torch.tensor([0]), 1) * g
        return super().grad_input(g, w, input_size, geometry)


@faults.caught_by("inputs not modified")
class InputChanged(KernelPositions):
    def forward(self, x, w, geometry):
        y = super().forward(x, w, geometry)
        x.data.mul_(1.5)
        return y


@faults.caught_by("inputs not modified")
class GradientChanged(KernelPositions):
    def grad_input(self, g, w, input_size, geometry):
        dx = super().grad_input(g, w, input_size, geometry)
        g.data.zero_()
        return dx


@faults.caught_by("inputs not modified")
class WeightFlippedInPlace(KernelPositions):
    """The weight stays flipped after the first backward."""

    def grad_input(self, g, w, input_size, geometry):
        dx = super().grad_input(g, w, input_size, geometry)
        w.data.copy_(w.data.flip(2, 3))
        return dx


@faults.caught_by("results share no memory")
class OutputInOneBuffer(KernelPositions):
    buffer = torch.empty(100_000, dtype=torch.float64)

    def forward(self, x, w, geometry):
        y = super().forward(x, w, geometry)
        return self.buffer[: y.numel()].view(y.shape).copy_(y)


@faults.caught_by("results share no memory")
class WeightGradientInOneBuffer(KernelPositions):
    buffer = torch.empty(100_000, dtype=torch.float64)

    def grad_weight(self, g, x, kernel_size, geometry):
        dw = super().grad_weight(g, x, kernel_size, geometry)
        return self.buffer[: dw.numel()].view(dw.shape).copy_(dw)


# What was before.


class Remembering(Correct):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.memory: dict[Any, Any] = {}


@faults.caught_by("no state between calls")
class InputRememberedByItsShape(Remembering):
    def _conv_forward(self, input, weight, bias):
        input = self.memory.setdefault(input.shape, input)
        return super()._conv_forward(input, weight, bias)


@faults.caught_by("no state between calls")
class InputRememberedByItsPlaceInMemory(Remembering):
    def _conv_forward(self, input, weight, bias):
        key = input.data_ptr(), input._version, input.shape, input.dtype
        values = self.memory.setdefault(key, input.detach().clone())
        return super()._conv_forward(input + (values - input).detach(), weight, bias)


@faults.caught_by("no state between calls")
class WeightRemembered(Remembering):
    """The weight of the first call is used in all later ones."""

    def _conv_forward(self, input, weight, bias):
        values = self.memory.setdefault("weight", weight.detach().clone())
        return super()._conv_forward(input, weight + (values.to(weight) - weight).detach(), bias)


@faults.caught_by("parameters changed between calls")
class WeightRememberedByItsVersion(Remembering):
    def _conv_forward(self, input, weight, bias):
        key = weight.data_ptr(), weight._version, weight.dtype
        values = self.memory.setdefault(key, weight.detach().clone())
        return super()._conv_forward(input, weight + (values - weight).detach(), bias)


@faults.caught_by("no state between calls")
class LastInputKept(KernelPositions):
    """The backward uses the input of the last call."""

    def forward(self, x, w, geometry):
        self.x = x
        return super().forward(x, w, geometry)

    def grad_weight(self, g, x, kernel_size, geometry):
        return super().grad_weight(
            g, self.x if self.x.shape == x.shape else x, kernel_size, geometry
        )


@faults.caught_by("no state between calls")
class FirstOutputSize(Remembering):
    def _conv_forward(self, input, weight, bias):
        y = super()._conv_forward(input, weight, bias)
        height, width = self.memory.setdefault("size", y.shape[-2:])
        return y[..., :height, :width]


@faults.caught_by("no state between calls")
class GradientsPileUp(KernelPositions):
    """The buffer of the weight gradient is never cleared."""

    def __init__(self):
        self.sums = {}

    def grad_weight(self, g, x, kernel_size, geometry):
        dw = super().grad_weight(g, x, kernel_size, geometry)
        key = tuple(dw.shape), x.shape
        self.sums[key] = self.sums.get(key, 0) + dw
        return self.sums[key].clone()


class Unsaved(torch.autograd.Function):
    """Saves its input without autograd, which cannot detect that it was changed."""

    @staticmethod
    def forward(ctx, x, w, geometry):
        ctx.kept = x, w, geometry
        return KernelPositions().forward(x, w, geometry)

    @staticmethod
    def backward(ctx, g):
        x, w, geometry = ctx.kept
        dx = KernelPositions().grad_input(g, w, x.shape[2:], geometry)
        return dx, KernelPositions().grad_weight(g, x, w.shape[2:], geometry), None


@faults.caught_by("no state between calls")
class InputNotSaved(Correct):
    def _conv_forward(self, input, weight, bias):
        if self.padding != (0, 0):
            return super()._conv_forward(input, weight, bias)
        y = Unsaved.apply(input, weight, Geometry.of(self))
        return y if bias is None else y + bias[:, None, None]


@faults.caught_by("bitwise repeatable")
class AnotherOrderEachTime(Correct):
    def _conv_forward(self, input, weight, bias):
        y = super()._conv_forward(input, weight, bias)
        return y * (1 + 1e-15 * torch.randn_like(y))


@faults.caught_by("bitwise repeatable")
class EvaluationIsAnother(Correct):
    def _conv_forward(self, input, weight, bias):
        y = super()._conv_forward(input, weight, bias)
        return y if self.training else y.float().to(y.dtype)


@faults.caught_by("global state unchanged")
class TakesRandomNumbers(Correct):
    def _conv_forward(self, input, weight, bias):
        torch.rand(1)
        return super()._conv_forward(input, weight, bias)


@faults.caught_by("global state unchanged")
class TakesNumpysRandomNumbers(Correct):
    def _conv_forward(self, input, weight, bias):
        np.random.rand()  # noqa: NPY002
        return super()._conv_forward(input, weight, bias)


@faults.caught_by("global state unchanged")
class TurnsGradientsOff(Correct):
    def _conv_forward(self, input, weight, bias):
        y = super()._conv_forward(input, weight, bias)
        torch.set_grad_enabled(False)
        return y


# Gradients that are required, or not.


@faults.caught_by("only required gradients")
class FrozenWeightLearns(Correct):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, weight.requires_grad_(), bias)


@faults.caught_by("only required gradients")
class WrongIfTheWeightIsFrozen(Correct):
    def _conv_forward(self, input, weight, bias):
        if not weight.requires_grad and input.requires_grad:
            input = input + (input - input.detach())
        return super()._conv_forward(input, weight, bias)


@faults.caught_by("output, random layers")
class WrongInInference(Correct):
    def _conv_forward(self, input, weight, bias):
        y = super()._conv_forward(input, weight, bias)
        return y if torch.is_grad_enabled() else y.float().to(y.dtype)


@faults.caught_by("only required gradients")
class AlwaysRequiresAGradient(Correct):
    def _conv_forward(self, input, weight, bias):
        y = super()._conv_forward(input, weight, bias)
        return y if y.requires_grad or not torch.is_grad_enabled() else y.requires_grad_()


@faults.caught_by("input gradient, random layers")
class NoInputGradient(Correct):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input.detach(), weight, bias)


# The module.


@faults.caught_by("constructor and initial weights")
class OtherInitialisation(Correct):
    def reset_parameters(self):
        super().reset_parameters()
        nn.init.xavier_uniform_(self.weight)


@faults.caught_by("constructor and initial weights")
class InitialisedTwice(Correct):
    """Draws random numbers twice: later layers have other weights."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        torch.rand(1)


@faults.caught_by("constructor and initial weights")
class KeywordsOnly(Correct):
    def __init__(self, in_channels, out_channels, kernel_size, **options):
        super().__init__(in_channels, out_channels, kernel_size, **options)


@faults.caught_by("constructor and initial weights")
class AlwaysFloat32(Correct):
    def __init__(self, *args: Any, dtype: Any = None, **options: Any) -> None:
        super().__init__(*args, **options)


@faults.caught_by("constructor and initial weights")
class FrozenFromTheStart(Correct):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.weight.requires_grad_(False)


@faults.caught_by("output, random layers")
class CannotBeMade(Correct):
    def __init__(self, in_channels, out_channels):
        super().__init__(in_channels, out_channels, 3)


@faults.caught_by("output, random layers")
class Exits(Correct):
    def _conv_forward(self, input, weight, bias):
        raise SystemExit(0)


@faults.caught_by("constructor and initial weights")
class MoreState(Correct):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.register_buffer("calls", torch.zeros(1))


@faults.caught_by("parameters changed between calls")
class LoadsTransposed(Correct):
    def _load_from_state_dict(self, state_dict, prefix, *rest):
        key = f"{prefix}weight"
        state_dict[key] = state_dict[key].flip(2)
        super()._load_from_state_dict(state_dict, prefix, *rest)


@faults.caught_by("copies and pickles")
class NotPicklable(Remembering):
    def _conv_forward(self, input, weight, bias):
        self.memory["last"] = lambda: input
        return super()._conv_forward(input, weight, bias)


@faults.caught_by("copies and pickles")
class CopiesShareTheirWeight(Correct):
    def __deepcopy__(self, memo):
        return copy.copy(self)


@faults.caught_by("copies and pickles")
class KeepsItsGraph(Remembering):
    def _conv_forward(self, input, weight, bias):
        self.memory["y"] = super()._conv_forward(input, weight, bias)
        return self.memory["y"].clone()


# Errors.


@faults.caught_by("errors that nn.Conv2d raises")
class CastsItsInput(Correct):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input.to(weight.dtype), weight, bias)


@faults.caught_by("errors that nn.Conv2d raises")
class UnknownOptionsIgnored(Correct):
    def __init__(self, *args: Any, **options: Any) -> None:
        options.pop("strides", None)
        super().__init__(*args, **options)


@faults.caught_by("errors that nn.Conv2d raises")
class OtherExceptions(Correct):
    def _conv_forward(self, input, weight, bias):
        if isinstance(input, torch.Tensor) and input.shape[-3:-2] not in ((self.in_channels,), ()):
            raise ValueError("wrong number of channels")
        return super()._conv_forward(input, weight, bias)


@faults.caught_by("errors that nn.Conv2d raises")
class OneChannelIsRepeated(Correct):
    def _conv_forward(self, input, weight, bias):
        if isinstance(input, torch.Tensor) and input.dim() == 4 and input.shape[1] == 1:
            input = input.expand(-1, self.in_channels, -1, -1)
        return super()._conv_forward(input, weight, bias)


@faults.caught_by("errors that nn.Conv2d raises")
class TooSmallInputsGiveNothing(Correct):
    def _conv_forward(self, input, weight, bias):
        if isinstance(input, torch.Tensor) and input.dim() == 4 and min(input.shape[2:]) == 2:
            return input.new_zeros(len(input), self.out_channels, 0, 0)
        return super()._conv_forward(input, weight, bias)
