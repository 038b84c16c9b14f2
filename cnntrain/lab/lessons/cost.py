"""Where a network's work is, and where its time goes."""

import statistics
import textwrap
import time
from collections.abc import Sequence
from typing import Any

import torch
import torchvision
from matplotlib.figure import Figure
from pydantic import PositiveInt
from torch import Tensor, nn

from cnntrain.config import ConfigError, as_config_error, build, compose
from cnntrain.conv import BACKENDS
from cnntrain.lab.lessons.lesson import Lesson
from cnntrain.models import LayerSummary, summarise, uncalled_layers
from cnntrain.models.introspection import forward_hooks, leaf_modules
from cnntrain.terminal import fit_lines, left_out_lines, width

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

    A multiply-accumulate is one product and one sum. How long a layer takes is not how many of
    them it has: the same MACs cost more as loops than as one matrix product, and layers that have
    none, such as pooling, take their time too. Times are of the forward on the CPU, medians.

    Args:
        model: A choice of conf/model, or for a torchvision network its name, such as resnet18.
        backends: Which; by default all.
        batch_size: Images in a batch.
        rounds: Turns of each backend.
        threads: Of PyTorch; by default its own choice.
    """
    names = list(BACKENDS) if backends is None else backends
    unknown = [name for name in names if name not in BACKENDS]
    if unknown or not names:
        raise ConfigError([f"backends={unknown}: choose from {', '.join(BACKENDS)}"])
    networks = {name: _network(model, name) for name in names}
    layers = summarise(networks[names[0]], IMAGE)
    if left := uncalled_layers(networks[names[0]], layers):
        raise ConfigError(
            [
                f"model={model}: {left[0]} is never called, as something else computes with its "
                "weights, and would not be counted; take a network without attention"
            ]
        )
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        times = layer_times(networks, batch_size, rounds)
        text, left_out = fit_lines(
            lambda left_out: "\n".join(_lines(model, layers, times, batch_size, left_out)),
            ("share", "GMAC/s", "MACs/image", *names[:0:-1]),
        )
        text = "\n".join([text, *left_out_lines(left_out)])
    finally:
        torch.set_num_threads(before)
    return Lesson(text, lambda: _draw(model, layers, times))


def _network(model: str, backend: str) -> nn.Module:
    """In evaluation; ConfigError if there is none of this name."""
    try:
        cfg = compose([f"model={model}"])
    except ConfigError as error:
        if model not in torchvision.models.list_models(module=torchvision.models):
            raise error from None
        small = str("vit" not in model).lower()  # of which the patches' size is fixed
        cfg = compose(["model=torchvision", f"model.name={model}", f"model.small_images={small}"])
    with as_config_error("model"):
        conv = BACKENDS[backend]
        return build(cfg.model, conv=conv, in_shape=IMAGE, num_classes=10).eval()


def layer_times(
    networks: dict[str, nn.Module], batch_size: int, rounds: int
) -> dict[str, list[float]]:
    """Seconds that each layer's forward takes, by backend: medians, backends in turns."""
    images = torch.randn(batch_size, *IMAGE, generator=torch.Generator().manual_seed(0))
    found: dict[str, list[list[float]]] = {name: [] for name in networks}
    for turn in range(rounds + 1):
        for name, network in networks.items():
            taken = _timed(network, images)
            if turn:  # the first one warms up
                found[name].append(taken)
    return {
        name: [statistics.median(layer) for layer in zip(*turns, strict=True)]
        for name, turns in found.items()
    }


def _timed(network: nn.Module, images: Tensor) -> list[float]:
    """Seconds of each layer's forward, in the order in which the images meet them."""
    begun: list[float] = []
    taken: list[float] = []

    def begin(*_: Any) -> None:
        begun.append(time.perf_counter())

    def end(*_: Any) -> None:
        taken.append(time.perf_counter() - begun.pop())

    layers = leaf_modules(network)
    before = [layer.register_forward_pre_hook(begin) for layer in layers]
    with forward_hooks(layers, end), torch.no_grad():
        network(images)
    for hook in before:
        hook.remove()
    return taken


def _lines(
    model: str,
    layers: Sequence[LayerSummary],
    times: dict[str, list[float]],
    batch_size: int,
    left_out: Sequence[str],
) -> list[str]:
    times = {name: taken for name, taken in times.items() if name not in left_out}
    total = sum(layer.macs for layer in layers) or 1
    kinds = [_kind(layer) for layer in layers]
    wide = max(len(layer.name) + len(kind) + 2 for layer, kind in zip(layers, kinds, strict=True))

    def row(name: str, macs: str, share: str, cells: Sequence[tuple[str, str]]) -> str:
        columns = [("layer", name, wide), ("MACs/image", f"{macs:>14}", 14)]
        columns += [("share", f"{share:>8}", 8)]
        for taken, rate in cells:
            columns += [("ms", f"{taken:>12}", 12), ("GMAC/s", f"{rate:>8}", 8)]
        shown = [f"{text:{size}}" for title, text, size in columns if title not in left_out]
        return "".join(shown).rstrip()

    lines = [row("layer", "MACs/image", "share", [(name, "GMAC/s") for name in times])]
    for i, (layer, kind) in enumerate(zip(layers, kinds, strict=True)):
        rates = [layer.macs * batch_size / taken[i] / 1e9 for taken in times.values()]
        cells = [
            (f"{taken[i] * 1000:.3f}", f"{rate:.1f}" if layer.macs else "")
            for taken, rate in zip(times.values(), rates, strict=True)
        ]
        macs, share = f"{layer.macs:,}", f"{layer.macs / total:.1%}"
        name = f"{layer.name}  {kind}"
        lines.append(row(name, macs, share, cells) if layer.macs else row(name, "", "", cells))
    cells = [
        (f"{sum(taken) * 1000:.3f}", f"{total * batch_size / sum(taken) / 1e9:.1f}")
        for taken in times.values()
    ]
    last = row("total", f"{sum(layer.macs for layer in layers):,}", "", cells)
    head = f"{model}, a batch of {batch_size}, forward, {torch.get_num_threads()} threads; in ms"
    return [*textwrap.wrap(head, width()), "", *lines, "", last]


def _draw(model: str, layers: Sequence[LayerSummary], times: dict[str, list[float]]) -> Figure:
    """Shares of the MACs and of each backend's time, a group of bars for each layer."""
    total = sum(layer.macs for layer in layers) or 1
    shares = {"MACs": [layer.macs / total for layer in layers]}
    shares |= {f"time, {name}": [t / sum(taken) for t in taken] for name, taken in times.items()}
    shown = sorted(range(len(layers)), key=lambda i: -max(share[i] for share in shares.values()))
    shown = sorted(shown[:16])  # of a deep network those that matter most
    figure = Figure(figsize=(9, 0.9 + 0.42 * len(shown)), layout="constrained")
    axes = figure.subplots()
    tall = 0.8 / len(shares)
    for number, (name, share) in enumerate(shares.items()):
        colour = "#555555" if name == "MACs" else COLOURS[(number - 1) % len(COLOURS)]
        places = [row + number * tall for row in range(len(shown))]
        axes.barh(places, [100 * share[i] for i in shown], tall, color=colour, label=name)
    axes.set_yticks([row + 0.4 - tall / 2 for row in range(len(shown))])
    axes.set_yticklabels([f"{layers[i].name}  {_kind(layers[i])}" for i in shown])
    axes.invert_yaxis()
    axes.set_xlabel("% of the whole")
    axes.set_title(f"{model}: where the work is, and where the time goes", fontsize=11)
    axes.legend(frameon=False, loc="lower right")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure


def _kind(layer: LayerSummary) -> str:
    """The class of a layer; of a convolution not its backend, as there are several."""
    return "Conv2d" if layer.kind.endswith("Conv2d") else layer.kind
