"""What stands between two layers, and what it lets through of a gradient."""

import torch
from matplotlib.figure import Figure
from torch import Tensor

from cnntrain.lab.lessons.lesson import INK, SOFT, Lesson
from cnntrain.models.layers import ACTIVATIONS

POINTS = (-4.0, -2.0, -1.0, 0.0, 1.0, 2.0, 4.0)


def curve(name: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """The activation and its derivative at points (N,), by autograd."""
    x = x.clone().requires_grad_()
    y = ACTIVATIONS[name]()(x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    return y.detach(), slope


def activations() -> Lesson:
    """relu, leaky_relu, sigmoid and tanh with their derivatives.

    A gradient is multiplied by the derivative of every activation that it passes on its way back.
    That of sigmoid is at most 1/4, and those of sigmoid and tanh are almost nothing far from zero:
    there a network stops learning. Those of relu and leaky_relu are 1 for all that is positive.
    """
    x = torch.tensor(POINTS, dtype=torch.float64)
    lines = ["x".ljust(14) + "".join(f"{point:>9g}" for point in POINTS), ""]
    for name in ACTIVATIONS:
        for label, values in zip((name, "  derivative"), curve(name, x), strict=True):
            lines.append(label.ljust(14) + "".join(f"{value:9.4f}" for value in values))
        lines.append("")
    wide = torch.linspace(-6, 6, 1201, dtype=torch.float64)
    largest = {name: curve(name, wide)[1].max().item() for name in ACTIVATIONS}
    lines += ["the largest derivative, and what four such layers leave of a gradient"]
    lines += [f"{name:14}{slope:9.4f}{slope**4:12.6f}" for name, slope in largest.items()]
    return Lesson("\n".join(lines), _draw)


def _draw() -> Figure:
    figure = Figure(figsize=(9, 4.8), layout="constrained")
    rows = figure.subplots(2, len(ACTIVATIONS), sharex=True, sharey="row")
    x = torch.linspace(-5, 5, 1000, dtype=torch.float64)
    for column, name in enumerate(ACTIVATIONS):
        for axes, values, colour in zip(
            rows[:, column], curve(name, x), ("#0072B2", "#D55E00"), strict=True
        ):
            axes.axhline(0, color=SOFT, linewidth=0.8)
            axes.axvline(0, color=SOFT, linewidth=0.8)
            axes.plot(x, values, color=colour, linewidth=2)
            for side in ("top", "right"):
                axes.spines[side].set_visible(False)
        rows[0, column].set_title(name, fontsize=11, color=INK)
    rows[0, 0].set_ylim(-1.5, 3)
    rows[1, 0].set_ylim(-0.1, 1.1)
    rows[0, 0].set_ylabel("activation")
    rows[1, 0].set_ylabel("derivative")
    return figure
