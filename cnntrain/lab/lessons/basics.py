"""Lessons `patterns` and `activations`: what a kernel responds to, and gradients of activations."""

import torch
from matplotlib.figure import Figure
from torch import Tensor, tensor

from cnntrain.config import ConfigError
from cnntrain.conv import BACKENDS
from cnntrain.lab.lessons.lesson import (
    INK,
    LIGHT,
    Lesson,
    Panel,
    matrix_lines,
    short_number,
    side_by_side,
)
from cnntrain.models.layers import ACTIVATIONS

KERNELS = {
    "diagonal": [[0, 0, 1], [0, 1, 0], [1, 0, 0]],
    "horizontal": [[0, 0, 0], [1, 1, 1], [0, 0, 0]],
    "ring": [[1, 1, 1], [1, 0, 1], [1, 1, 1]],
}
IMAGES = {
    name: [[int(pixel == "#") for pixel in row] for row in rows.split()]
    for name, rows in {
        "diagonal": "......# .....#. ....#.. ...#... ..#.... .#..... #......",
        "ring": "....... ....... ..###.. ..#.#.. ..###.. ....... .......",
    }.items()
}
NOTE = "each kernel on\neach image\n\none colour scale for\nthe outputs of a row"
POINTS = (-4.0, -2.0, -1.0, 0.0, 1.0, 2.0, 4.0)


def responses(backend: str = "native") -> dict[tuple[str, str], Tensor]:
    """The output (5, 5) of each kernel for each image, by (image, kernel).

    Raises:
        ConfigError: there is no such backend.
    """
    if backend not in BACKENDS:
        raise ConfigError([f"backend={backend}: choose from {', '.join(BACKENDS)}"])
    conv = BACKENDS[backend](1, len(KERNELS), 3, bias=False)
    conv.weight.data = tensor(list(KERNELS.values())).float()[:, None]  # (3, 1, 3, 3)
    outputs: dict[tuple[str, str], Tensor] = {}
    for image, rows in IMAGES.items():
        maps = conv(tensor(rows).float()[None]).detach()  # (3, 5, 5)
        outputs |= {(image, kernel): maps[i] for i, kernel in enumerate(KERNELS)}
    return outputs


def patterns(*, backend: str = "native") -> Lesson:
    """A diagonal, a horizontal and a ring kernel on an image of a diagonal and one of a ring.

    Where pattern and kernel agree, the output is strongest: each output is the sum of the pixels
    under the ones of the kernel.

    Args:
        backend: The convolution that computes it.
    """
    outputs = responses(backend)
    lines = []
    for image, pixels in IMAGES.items():
        matrices = [pixels, *(outputs[image, kernel].tolist() for kernel in KERNELS)]
        blocks = [matrix_lines(rows) for rows in matrices]
        titles = zip(["image", *KERNELS], blocks, strict=True)
        lines += [f"image: {image}", "", "     ".join(t.ljust(len(b[0])) for t, b in titles)]
        lines += [*side_by_side(blocks, [" " * 5] * len(KERNELS)), ""]
    lines.append("strongest output".ljust(20) + "".join(f"{kernel:>12}" for kernel in KERNELS))
    for image in IMAGES:
        strongest = [short_number(outputs[image, kernel].max().item()) for kernel in KERNELS]
        lines.append(f"  on the {image}".ljust(20) + "".join(f"{s:>12}" for s in strongest))
    return Lesson("\n".join(lines), lambda: _draw_patterns(outputs))


def _draw_patterns(outputs: dict[tuple[str, str], Tensor]) -> Figure:
    figure = Figure(figsize=(9, 7), layout="constrained")
    axes = figure.subplots(len(IMAGES) + 1, len(KERNELS) + 1)
    axes[0, 0].set_axis_off()
    axes[0, 0].text(0.5, 0.5, NOTE, ha="center", va="center", fontsize=11, color=INK)
    for column, (name, kernel) in enumerate(KERNELS.items(), start=1):
        Panel(kernel, f"kernel: {name}").draw(axes[0, column])
    for row, (image, pixels) in enumerate(IMAGES.items(), start=1):
        Panel(pixels, f"image: {image}").draw(axes[row, 0])
        largest = max(outputs[image, name].max().item() for name in KERNELS)
        for column, name in enumerate(KERNELS, start=1):
            output = outputs[image, name]
            title = f"strongest: {short_number(output.max().item())}"
            Panel(output.tolist(), title).draw(axes[row, column], largest)
    return figure


def activations() -> Lesson:
    """relu, leaky_relu, sigmoid and tanh with their derivatives.

    In the backward pass a gradient is multiplied by the derivative of every activation. That of
    sigmoid is at most 1/4, and those of sigmoid and tanh vanish far from zero: there a network
    stops learning. Those of relu and leaky_relu are 1 for all positive inputs.
    """
    x = torch.tensor(POINTS, dtype=torch.float64)
    lines = ["x".ljust(14) + "".join(f"{point:>9g}" for point in POINTS), ""]
    for name in ACTIVATIONS:
        for label, values in zip((name, "  derivative"), curve(name, x), strict=True):
            lines.append(label.ljust(14) + "".join(f"{value:9.4f}" for value in values))
        lines.append("")
    wide = torch.linspace(-6, 6, 1201, dtype=torch.float64)
    largest = {name: curve(name, wide)[1].max().item() for name in ACTIVATIONS}
    lines += ["the largest derivative, and what remains of a gradient after four such layers"]
    lines += [f"{name:14}{slope:9.4f}{slope**4:12.6f}" for name, slope in largest.items()]
    return Lesson("\n".join(lines), _draw_activations)


def curve(name: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """An activation and its derivative at points x (N,), by autograd."""
    x = x.clone().requires_grad_()
    y = ACTIVATIONS[name]()(x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    return y.detach(), slope


def _draw_activations() -> Figure:
    figure = Figure(figsize=(9, 4.8), layout="constrained")
    rows = figure.subplots(2, len(ACTIVATIONS), sharex=True, sharey="row")
    x = torch.linspace(-5, 5, 1000, dtype=torch.float64)
    for column, name in enumerate(ACTIVATIONS):
        curves = zip(rows[:, column], curve(name, x), ("#0072B2", "#D55E00"), strict=True)
        for axes, values, colour in curves:
            axes.axhline(0, color=LIGHT, linewidth=0.8)
            axes.axvline(0, color=LIGHT, linewidth=0.8)
            axes.plot(x, values, color=colour, linewidth=2)
            axes.spines[["top", "right"]].set_visible(False)
        rows[0, column].set_title(name, fontsize=11, color=INK)
    rows[0, 0].set(ylim=(-1.5, 3), ylabel="activation")
    rows[1, 0].set(ylim=(-0.1, 1.1), ylabel="derivative")
    return figure
