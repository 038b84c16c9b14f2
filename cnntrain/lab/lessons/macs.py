"""Lesson `cost`: multiply-accumulate operations and measured time of each layer."""

import statistics
import time
from collections.abc import Iterable, Sequence

import torch
import torchvision
from matplotlib.figure import Figure
from pydantic import PositiveInt
from rich.table import Table
from torch import Tensor, nn

from cnntrain.config import ConfigError, as_config_error, build, compose
from cnntrain.conv import BACKENDS
from cnntrain.lab.lessons.lesson import Lesson
from cnntrain.models import LayerSummary, summarise, uncalled_layers
from cnntrain.models.introspection import forward_hooks, leaf_modules
from cnntrain.terminal import table_text, width

IMAGE = (1, 28, 28)  # (C, H, W)
COLOURS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442"]


def cost(
    *,
    model: str = "lenet5",
    backends: list[str] | None = None,
    batch_size: PositiveInt = 128,
    rounds: PositiveInt = 20,
    threads: PositiveInt | None = None,
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
        threads: Of PyTorch; by default its own choice.
    """
    names = list(BACKENDS) if backends is None else backends
    unknown = [name for name in names if name not in BACKENDS]
    if unknown or not names:
        raise ConfigError([f"backends={unknown}: choose from {', '.join(BACKENDS)}"])
    networks = {name: _network(model, name) for name in names}
    layers = summarise(networks[names[0]], IMAGE)
    if left := uncalled_layers(networks[names[0]], layers):
        problem = "is never called, as another layer uses its weights, and cannot be counted"
        raise ConfigError([f"model={model}: {left[0]} {problem}; choose one without attention"])
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        times = layer_times(networks, batch_size, rounds)
        threads = torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
    head = f"{model}, a batch of {batch_size}, forward, {threads} threads; in ms"
    optional = ("share", "GMAC/s", "MACs/image", *names[:0:-1])
    table = table_text(_table(layers, times, batch_size), optional, width())
    text = "\n".join(line.rstrip() for line in table.splitlines())
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
    with as_config_error("model"):
        conv = BACKENDS[backend]
        return build(cfg.model, conv=conv, in_shape=IMAGE, num_classes=10).eval()


def layer_times(
    networks: dict[str, nn.Module], batch_size: int, rounds: int
) -> dict[str, list[float]]:
    """Median seconds of each layer's forward, by backend, measured in turns."""
    images = torch.randn(batch_size, *IMAGE, generator=torch.Generator().manual_seed(0))
    measured: dict[str, list[list[float]]] = {name: [] for name in networks}
    for _ in range(rounds + 1):
        for name, network in networks.items():
            measured[name].append(_timed(network, images))
    return {  # without the first round, a warm-up
        name: [statistics.median(layer[1:]) for layer in zip(*times, strict=True)]
        for name, times in measured.items()
    }


def _timed(network: nn.Module, images: Tensor) -> list[float]:
    """Seconds of each layer's forward, in the order of execution."""
    begun: list[float] = []
    seconds: list[float] = []
    layers = leaf_modules(network)
    handles = [layer.register_forward_pre_hook(lambda *_: begun.append(time.perf_counter()))
               for layer in layers]  # fmt: skip
    end = lambda *_: seconds.append(time.perf_counter() - begun.pop())  # noqa: E731
    with forward_hooks(layers, end), torch.no_grad():
        network(images)
    for handle in handles:
        handle.remove()
    return seconds


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
    total = sum(layer.macs for layer in layers) or 1
    shares = {"MACs": [layer.macs / total for layer in layers]}
    shares |= {f"time, {name}": [t / sum(taken) for t in taken] for name, taken in times.items()}
    shown = sorted(range(len(layers)), key=lambda i: -max(share[i] for share in shares.values()))
    shown = sorted(shown[:16])  # the largest of a deep network
    figure = Figure(figsize=(9, 0.9 + 0.42 * len(shown)), layout="constrained")
    axes = figure.subplots()
    thickness = 0.8 / len(shares)
    for number, (name, share) in enumerate(shares.items()):
        colour = "#555555" if name == "MACs" else COLOURS[(number - 1) % len(COLOURS)]
        positions = [row + number * thickness for row in range(len(shown))]
        axes.barh(positions, [100 * share[i] for i in shown], thickness, color=colour, label=name)
    axes.set_yticks([row + 0.4 - thickness / 2 for row in range(len(shown))])
    axes.set_yticklabels([f"{layers[i].name}  {_kind(layers[i])}" for i in shown])
    axes.invert_yaxis()
    axes.set_xlabel("% of the total")
    axes.set_title(f"{model}: MACs and time of each layer", fontsize=11)
    axes.legend(frameon=False, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _kind(layer: LayerSummary) -> str:
    """The class of a layer; Conv2d for every backend."""
    return "Conv2d" if layer.kind.endswith("Conv2d") else layer.kind
