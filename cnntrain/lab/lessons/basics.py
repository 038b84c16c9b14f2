"""Lessons `patterns`, `activations` and `cost`: kernels, derivatives of activations, MACs."""

import itertools
import time
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
import torchvision
from matplotlib.figure import Figure
from pydantic import PositiveInt
from rich.table import Table
from torch import Tensor, nn, tensor

from cnntrain.config import ConfigError, as_config_error, build, compose
from cnntrain.conv import BACKENDS
from cnntrain.lab.lessons.lesson import INK, Lesson, Panel, matrix_lines, short_number, side_by_side
from cnntrain.models import LayerSummary, summarise, uncalled_layers
from cnntrain.models.introspection import forward_hooks, leaf_modules
from cnntrain.models.layers import ACTIVATIONS
from cnntrain.terminal import table_text, width

KERNELS = {
    "diagonal": [[0, 0, 1], [0, 1, 0], [1, 0, 0]],
    "horizontal": [[0, 0, 0], [1, 1, 1], [0, 0, 0]],
    "ring": [[1, 1, 1], [1, 0, 1], [1, 1, 1]],
}
IMAGES = {name: np.zeros((7, 7), int) for name in ("diagonal", "ring")}
np.fill_diagonal(np.fliplr(IMAGES["diagonal"]), 1)
IMAGES["ring"][2:5, 2:5] = KERNELS["ring"]
NOTE = "each kernel on\neach image\n\none colour scale for\nthe outputs of a row"
IN_SHAPE = (1, 28, 28)  # (C, H, W)
COLOURS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442"]
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
    for image, pixels in IMAGES.items():
        maps = conv(tensor(pixels).float()[None]).detach()  # (3, 5, 5)
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
        matrices = {"image": pixels} | {kernel: outputs[image, kernel] for kernel in KERNELS}
        blocks = [[line + " " * 5 for line in matrix_lines(m)] for m in matrices.values()]
        titles = "".join(t.ljust(len(block[0])) for t, block in zip(matrices, blocks, strict=True))
        lines += [f"image: {image}", "", titles.rstrip(), *side_by_side(*blocks), ""]
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
        Panel(np.array(kernel), f"kernel: {name}").draw(axes[0, column])
    for row, (image, pixels) in enumerate(IMAGES.items(), start=1):
        Panel(pixels, f"image: {image}").draw(axes[row, 0])
        largest = max(outputs[image, name].max().item() for name in KERNELS)
        for column, name in enumerate(KERNELS, start=1):
            title = f"strongest: {short_number(outputs[image, name].max().item())}"
            Panel(outputs[image, name], title).draw(axes[row, column], largest)
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
            axes.axhline(0, color="#bbbbbb", linewidth=0.8)
            axes.axvline(0, color="#bbbbbb", linewidth=0.8)
            axes.plot(x, values, color=colour, linewidth=2)
            axes.spines[["top", "right"]].set_visible(False)
        rows[0, column].set_title(name, fontsize=11, color=INK)
    rows[0, 0].set(ylim=(-1.5, 3), ylabel="activation")
    rows[1, 0].set(ylim=(-0.1, 1.1), ylabel="derivative")
    return figure


def cost(
    *,
    model: str = "lenet5",
    backends: list[str] | None = None,
    batch_size: PositiveInt = 128,
    rounds: PositiveInt = 20,
) -> Lesson:
    """MACs of every layer of a model against measured time on each backend.

    A multiply-accumulate operation is one product and one sum. Their number does not determine the
    time: the same MACs take longer as loops than as one matrix product, and layers without any,
    such as pooling, take time too. Times are medians of the forward on the CPU.

    Args:
        model: A choice of conf/model, or the name of a torchvision network, such as resnet18.
        backends: By default all.
        batch_size: Images in a batch.
        rounds: Measurements of each backend, in turns.
    """
    names = list(BACKENDS) if backends is None else backends
    unknown = [name for name in names if name not in BACKENDS]
    if unknown or not names:
        raise ConfigError([f"backends={unknown}: choose from {', '.join(BACKENDS)}"])
    networks = {name: _network(model, name) for name in names}
    layers = summarise(networks[names[0]], IN_SHAPE)
    if left := uncalled_layers(networks[names[0]], layers):
        problem = "is never called, as another layer uses its weights, and cannot be counted"
        raise ConfigError([f"model={model}: {left[0]} {problem}; choose one without attention"])
    times = layer_times(networks, batch_size, rounds)
    threads = torch.get_num_threads()
    head = f"{model}, a batch of {batch_size}, forward, {threads} threads; in ms"
    optional = ("share", "GMAC/s", "MACs/image", *names[:0:-1])
    table = table_text(_table(layers, times, batch_size), optional, width())
    text = "\n".join(map(str.rstrip, table.splitlines()))
    return Lesson(f"{head}\n\n{text}", lambda: _draw(model, layers, times))


def _network(model: str, backend: str) -> nn.Module:
    """A network in evaluation mode; ConfigError if there is none of this name."""
    try:
        cfg = compose([f"model={model}"])
    except ConfigError as error:
        if model not in torchvision.models.list_models(module=torchvision.models):
            raise error from None
        small = str("vit" not in model).lower()  # the size of ViT's patches is fixed
        cfg = compose(["model=torchvision", f"model.name={model}", f"model.small_images={small}"])
    options = {"conv": BACKENDS[backend], "in_shape": IN_SHAPE, "num_classes": 10}
    with as_config_error("model"):
        return build(cfg.model, **options).eval()


def layer_times(
    networks: dict[str, nn.Module], batch_size: int, rounds: int
) -> dict[str, list[float]]:
    """Median seconds of each layer's forward, by backend, measured in turns."""
    images = torch.randn(batch_size, *IN_SHAPE, generator=torch.Generator().manual_seed(0))
    measured: dict[str, list[list[float]]] = {name: [] for name in networks}
    for _ in range(rounds + 1):
        for name, network in networks.items():
            measured[name].append(_timed(network, images))
    # without the first round, a warm-up
    return {name: np.median(times[1:], axis=0).tolist() for name, times in measured.items()}


def _timed(network: nn.Module, images: Tensor) -> list[float]:
    """Seconds of each layer's forward, in the order of execution."""
    marks: list[float] = []
    layers = leaf_modules(network)

    def mark(*_: Any) -> None:
        marks.append(time.perf_counter())

    handles = [layer.register_forward_pre_hook(mark) for layer in layers]
    with forward_hooks(layers, mark), torch.no_grad():
        network(images)
    for handle in handles:
        handle.remove()
    return np.subtract(marks[1::2], marks[::2]).tolist()


def _table(layers: Sequence[LayerSummary], times: dict[str, list[float]], batch_size: int) -> Table:
    """A row for each layer and for their sum; on each backend milliseconds and GMAC/s."""
    total = sum(layer.macs for layer in layers)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("layer")
    for title in ["MACs/image", "share", *(t for name in times for t in (name, "GMAC/s"))]:
        table.add_column(title, justify="right")

    def add_row(name: str, macs: int, seconds: Iterable[float]) -> None:
        cells = [f"{macs:,}", f"{macs / total:.1%}"] if macs else ["", ""]
        for taken in seconds:
            rate = f"{macs * batch_size / taken / 1e9:.1f}" if macs else ""
            cells += [f"{1000 * taken:.3f}", rate]
        table.add_row(name, *cells)

    for layer, *seconds in zip(layers, *times.values(), strict=True):
        add_row(f"{layer.name}  {_kind(layer)}", layer.macs, seconds)
    table.add_row()
    add_row("total", total, map(sum, times.values()))
    return table


def _draw(model: str, layers: Sequence[LayerSummary], times: dict[str, list[float]]) -> Figure:
    """Shares of the MACs and of each backend's time, a group of bars for each layer."""
    labels = ["MACs", *(f"time, {name}" for name in times)]
    amounts = np.array([[layer.macs for layer in layers], *times.values()], float)
    shares = 100 * amounts / np.maximum(amounts.sum(1, keepdims=True), 1e-12)
    shown = np.sort(np.argsort(-shares.max(0), kind="stable")[:16])  # of a deep network
    figure = Figure(figsize=(9, 0.9 + 0.42 * len(shown)), layout="constrained")
    axes = figure.subplots()
    thickness, rows = 0.8 / len(shares), np.arange(len(shown))
    colours = itertools.chain(["#555555"], itertools.cycle(COLOURS))
    for number, (label, share, colour) in enumerate(zip(labels, shares, colours, strict=False)):
        axes.barh(rows + number * thickness, share[shown], thickness, color=colour, label=label)
    names = [f"{layers[i].name}  {_kind(layers[i])}" for i in shown]
    axes.set_yticks(rows + 0.4 - thickness / 2, names)
    axes.invert_yaxis()
    axes.set_xlabel("% of the total")
    axes.set_title(f"{model}: MACs and time of each layer", fontsize=11)
    axes.legend(frameon=False, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _kind(layer: LayerSummary) -> str:
    """The class of a layer; Conv2d for every backend."""
    return "Conv2d" if layer.kind.endswith("Conv2d") else layer.kind
