"""Faults of sizes, caches, dtypes, options, threads and memory, with the line that reports each."""

import itertools
import threading
import warnings

import torch
from faults import Faults, KernelPositions
from torch import nn

faults = Faults()


# A path for some sizes, wrong in its last number. x and w are the sizes of input and weight.

SIZES = {
    "BatchOf16": lambda x, w, how: x[0] and x[0] % 16 == 0,
    "BatchOf128": lambda x, w, how: x[0] == 128,
    "BatchOf33": lambda x, w, how: x[0] == 33,
    "BatchOf63": lambda x, w, how: x[0] == 63,
    "WidthFrom129": lambda x, w, how: x[3] >= 129,
    "Height64": lambda x, w, how: x[2] == 64,
    "SidesFrom256": lambda x, w, how: min(x[2:]) >= 256,
    "Channels64": lambda x, w, how: w[1] == 64,
    "Channels129": lambda x, w, how: w[1] == 129,
    "Filters128": lambda x, w, how: w[0] == 128,
    "Filters257": lambda x, w, how: w[0] == 257,
    "Kernel7": lambda x, w, how: max(w[2:]) == 7,
    "Kernel11WithStride": lambda x, w, how: max(w[2:]) >= 11 and how.stride != (1, 1),
    "Kernel16": lambda x, w, how: max(w[2:]) == 16,
    "SixGroups": lambda x, w, how: how.groups > 5 and w[1] > 1,
    "MultiplierOf2": lambda x, w, how: w[1] == 1 and w[0] == 2 * how.groups > 2,
    "MultiplierOf3": lambda x, w, how: w[1] == 1 and w[0] == 3 * how.groups > 3,
    "ColumnsOf64MiB": lambda x, w, how: w[1] * w[2] * w[3] * x[0] * x[2] * x[3] > 2**24,
}
FUNCTIONS = {"forward": "output", "grad_input": "input gradient", "grad_weight": "weight gradient"}


def wrong_at(name, function, applies):
    def method(self, a, b, *how):
        result = getattr(super(kind, self), function)(a, b, *how)
        sizes = {
            "forward": lambda: (a.shape, b.shape),
            "grad_input": lambda: ((*result.shape,), b.shape),
            "grad_weight": lambda: (b.shape, result.shape),
        }[function]()
        if result.numel() and applies(*sizes, how[-1]):
            result.view(-1)[result.numel() // 2] += 1
        return result

    kind = type(
        f"{name}In{function.title().replace('_', '')}", (KernelPositions,), {function: method}
    )
    return kind


for (name, applies), (function, quantity) in zip(
    SIZES.items(), itertools.cycle(FUNCTIONS.items()), strict=False
):
    faults.caught_by(f"{quantity}, sizes")(wrong_at(name, function, applies))


# A weight kept from an earlier call.


class Kept(nn.Conv2d):
    """Keeps the weight of its first call, in some mode and for as long as `key` is the same."""

    def keeps(self, w):
        return not torch.is_grad_enabled()

    def key(self, w):
        return 0

    def _conv_forward(self, input, weight, bias):
        if self.keeps(weight):
            key = self.key(weight)
            if self.__dict__.get("last") != key:
                self.__dict__.update(last=key, kept=weight.detach().clone())
            weight = self.kept
        return super()._conv_forward(input, weight, bias)


KEEPS = {
    "WithoutGradients": lambda self, w: not torch.is_grad_enabled(),
    "InInference": lambda self, w: torch.is_inference_mode_enabled(),
    "InEval": lambda self, w: not self.training and not torch.is_grad_enabled(),
    "Float32": lambda self, w: w.dtype == torch.float32 and not torch.is_grad_enabled(),
    "Half": lambda self, w: w.dtype == torch.bfloat16 and not torch.is_grad_enabled(),
}
KEYS = {
    "Forever": lambda self, w: 0,
    "ById": lambda self, w: id(w),
    "ByAddress": lambda self, w: w.data_ptr(),
    "ByVersion": lambda self, w: (w.data_ptr(), 0 if w.is_inference() else w._version),
}
for (when, keeps), (until, key) in itertools.product(KEEPS.items(), KEYS.items()):
    kind = type(f"Kept{when}{until}", (Kept,), {"keeps": keeps, "key": key})
    faults.caught_by("parameters changed between calls")(kind)


@faults.caught_by("no state between calls")
class KeptForOtherParameters(Kept):
    """Parameters that functional_call passes."""

    def keeps(self, w):
        return w is not self._parameters["weight"]

    def _conv_forward(self, input, weight, bias):
        if "first" not in self.__dict__:
            self.__dict__["first"] = weight
        return nn.Conv2d._conv_forward(self, input, self.__dict__["first"], bias)


@faults.caught_by("modes in any order")
class FirstModeDecides(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        self.__dict__.setdefault("learns", torch.is_grad_enabled())
        return super()._conv_forward(input, weight if self.learns else weight.detach(), bias)


@faults.caught_by("modes in any order")
class MadeInInferenceMode(nn.Conv2d):
    """Its scale cannot be saved for a backward if it was made in inference mode."""

    def _conv_forward(self, input, weight, bias):
        if self.__dict__.get("scale") is None or self.scale.dtype != weight.dtype:
            self.__dict__["scale"] = torch.ones_like(weight)
        return super()._conv_forward(input, weight * self.scale, bias)


@faults.caught_by("modes in any order")
class FrozenOnce(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        if not weight.requires_grad and torch.is_grad_enabled():
            self.__dict__["frozen"] = True
        if self.__dict__.get("frozen"):
            weight = weight.detach()
        return super()._conv_forward(input, weight, bias)


# Paths of one dtype.


def of_dtype(dtype, applies, line):
    class Path(nn.Conv2d):
        def _conv_forward(self, input, weight, bias):
            if input.dtype == dtype and applies(self, input, weight):
                input = input.flip(-1)
            return super()._conv_forward(input, weight, bias)

    Path.__name__ = f"{str(dtype).removeprefix('torch.').title()}{line.title().replace(' ', '')}"
    faults.caught_by(line)(Path)


def not_contiguous(self, x, w):
    return not x.is_contiguous()


def called_before(self, x, w):
    last = self.__dict__.get("size", x.shape)
    self.__dict__["size"] = x.shape
    return last != x.shape


for dtype in (torch.float32, torch.bfloat16, torch.float16):
    of_dtype(dtype, not_contiguous, "memory formats and strides")
    of_dtype(dtype, called_before, "no state between calls")


# Outputs, options, threads.


class Given(torch.autograd.Function):
    """Gives the second tensor in place of the first one."""

    @staticmethod
    def forward(ctx, made, given):
        return given.copy_(made).detach()

    @staticmethod
    def backward(ctx, g):
        return g, None


def ring(size):
    class Ring(nn.Conv2d):
        """Outputs are in the memory of earlier ones."""

        def _conv_forward(self, input, weight, bias):
            y = super()._conv_forward(input, weight, bias)
            made = self.__dict__.setdefault("made", {}).setdefault((y.shape, y.dtype), [])
            made.append(made.pop(0) if len(made) == size else torch.empty_like(y))
            return Given.apply(y, made[-1]) if torch.is_grad_enabled() else y

    Ring.__name__ = f"RingOf{size}"
    faults.caught_by("no state between calls")(Ring)


for size in (2, 4, 6):
    ring(size)


class KeepsItsOutput(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y):
        ctx.y = y.clone()
        return ctx.y

    @staticmethod
    def backward(ctx, g):
        return torch.where(ctx.y == 0, 0, g)


@faults.caught_by("no state between calls")
class NeedsItsOutput(nn.Conv2d):
    """The backward reads the output, which an in-place ReLU sets to 0."""

    def _conv_forward(self, input, weight, bias):
        y = super()._conv_forward(input, weight, bias)
        return y.double().exp().log().to(y.dtype) if y.requires_grad else y


def read_once(option):
    class Once(nn.Conv2d):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            self.__dict__["first"] = getattr(self, option)

        def _conv_forward(self, input, weight, bias):
            now = getattr(self, option)
            setattr(self, option, self.first)
            try:
                return super()._conv_forward(input, weight, bias)
            finally:
                setattr(self, option, now)

    Once.__name__ = f"{option.title().replace('_', '')}ReadOnce"
    faults.caught_by("no state between calls")(Once)


for option in ("stride", "dilation", "padding", "padding_mode"):
    read_once(option)


@faults.caught_by("no state between calls")
class DecidesAfterTwentyCalls(nn.Conv2d):
    calls = 0

    def _conv_forward(self, input, weight, bias):
        self.calls += 1
        y = super()._conv_forward(input, weight, bias)
        return y if self.calls < 20 else y + 1


@faults.caught_by("threads")
class ThreeThreads(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        y = super()._conv_forward(input, weight, bias)
        return y + 1 if torch.get_num_threads() == 3 else y


class OfThisThread(torch.autograd.Function):
    local = threading.local()

    @staticmethod
    def forward(ctx, y):
        OfThisThread.local.known = 1.0
        return y.clone()

    @staticmethod
    def backward(ctx, g):
        return g * getattr(OfThisThread.local, "known", 0.0)


@faults.caught_by("threads")
class BackwardInItsThread(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        return OfThisThread.apply(super()._conv_forward(input, weight, bias))


@faults.caught_by("threads")
class OneBuffer(nn.Conv2d):
    """The input is copied into one buffer that all threads share."""

    def _conv_forward(self, input, weight, bias):
        if threading.current_thread() is threading.main_thread():
            return super()._conv_forward(input, weight, bias)
        known = self.__dict__.setdefault("known", [])
        known.append(input)
        threading.Event().wait(0.01)
        return super()._conv_forward(known[-1] + 0 * input, weight, bias)


# Narrow sums and products.


def rounded(dtype, which):
    class Rounded(nn.Conv2d):
        def _conv_forward(self, input, weight, bias):
            if input.dtype == torch.float32:
                if which == "input":
                    input = input.to(dtype).float()
                else:
                    weight = weight.to(dtype).float()
            return super()._conv_forward(input, weight, bias)

    Rounded.__name__ = f"{which.title()}In{str(dtype).removeprefix('torch.').title()}"
    faults.caught_by("output, 12-bit integers")(Rounded)


for dtype, which in itertools.product((torch.bfloat16, torch.float16), ("input", "weight")):
    rounded(dtype, which)


# Derivatives of second order where the other factor is frozen.


class OnceDifferentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y):
        return y.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return g


@faults.caught_by("second derivatives")
class OnceWithAFrozenWeight(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        y = super()._conv_forward(input, weight, bias)
        return y if weight.requires_grad or not y.requires_grad else OnceDifferentiable.apply(y)


@faults.caught_by("second derivatives")
class OnceWithoutInputGradient(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        y = super()._conv_forward(input, weight, bias)
        return y if input.requires_grad or not y.requires_grad else OnceDifferentiable.apply(y)


# Strides of outputs, and what is left behind.


@faults.caught_by("memory formats and strides")
class TransposedOutput(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, weight, bias).mT.contiguous().mT


def does(name, what, when="call"):
    class Does(nn.Conv2d):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            if when == "constructor":
                what()

        def _conv_forward(self, input, weight, bias):
            y = super()._conv_forward(input, weight, bias)
            if when == "call":
                what()
            return y

    Does.__name__ = name
    faults.caught_by("global state unchanged")(Does)


does("FlushesDenormals", lambda: torch.set_flush_denormal(True))
does("ThreadsOfItsOwn", lambda: torch.set_num_threads(torch.get_num_threads() + 1), "constructor")
does("LowerPrecision", lambda: torch.set_float32_matmul_precision("medium"), "constructor")
does("OneDnnOff", lambda: setattr(torch.backends.mkldnn, "enabled", False), "constructor")
does("CudnnBenchmark", lambda: setattr(torch.backends.cudnn, "benchmark", True))
does("DefaultDtype", lambda: torch.set_default_dtype(torch.float64))
does("Anomaly", lambda: torch.autograd.set_detect_anomaly(True), "constructor")
does("Prints", lambda: print("computing"))
does("Warns", lambda: warnings.warn("is slow", stacklevel=1), "constructor")
does("DrawsNumbers", lambda: torch.rand(1))
does("Deterministic", lambda: torch.use_deterministic_algorithms(True), "constructor")


def leaves(name, what):
    class Leaves(nn.Conv2d):
        everything: list = []  # noqa: RUF012

        def _conv_forward(self, input, weight, bias):
            y = super()._conv_forward(input, weight, bias)
            self.everything.append(what(self, input, y))
            return y

    Leaves.__name__ = name
    faults.caught_by("no tensors kept after a call")(Leaves)


leaves("KeepsInputs", lambda layer, x, y: x)
leaves("KeepsOutputs", lambda layer, x, y: y)
leaves("KeepsGraphs", lambda layer, x, y: y.grad_fn)
leaves("Grows", lambda layer, x, y: torch.zeros(1))
leaves("KeepsLayers", lambda layer, x, y: layer)
