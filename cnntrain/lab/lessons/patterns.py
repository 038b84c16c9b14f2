"""A kernel finds what looks like it."""

from matplotlib.figure import Figure
from torch import Tensor, tensor

from cnntrain.config import ConfigError
from cnntrain.conv import BACKENDS
from cnntrain.lab.lessons.lesson import INK, Lesson, matrix, plain, show_matrix, side_by_side

KERNELS = {
    "diagonal": [[0, 0, 1], [0, 1, 0], [1, 0, 0]],
    "horizontal": [[0, 0, 0], [1, 1, 1], [0, 0, 0]],
    "ring": [[1, 1, 1], [1, 0, 1], [1, 1, 1]],
}
IMAGES = {
    "diagonal": "......# .....#. ....#.. ...#... ..#.... .#..... #......",
    "ring": "....... ....... ..###.. ..#.#.. ..###.. ....... .......",
}


def responses(backend: str = "native") -> dict[tuple[str, str], Tensor]:
    """What each kernel makes of each image (image, kernel): (5, 5). ConfigError for a backend that
    there is not."""
    if backend not in BACKENDS:
        raise ConfigError([f"backend={backend}: choose from {', '.join(BACKENDS)}"])
    conv = BACKENDS[backend](1, len(KERNELS), 3, bias=False)
    conv.weight.data = tensor(list(KERNELS.values())).float()[:, None]  # (3, 1, 3, 3)
    found: dict[tuple[str, str], Tensor] = {}
    for image, rows in IMAGES.items():
        maps = conv(tensor(_pixels(rows)).float()[None]).detach()  # (3, 5, 5)
        found |= {(image, kernel): maps[i] for i, kernel in enumerate(KERNELS)}
    return found


def patterns(*, backend: str = "native") -> Lesson:
    """A diagonal, a horizontal and a ring kernel on an image of a diagonal and one of a ring.

    Where pattern and kernel agree, the output is strongest: each output is the sum of the pixels
    under the ones of the kernel.

    Args:
        backend: The convolution that computes it.
    """
    found = responses(backend)
    lines = []
    for image in IMAGES:
        lines += [f"image: {image}", ""]
        shown = [_pixels(IMAGES[image]), *(found[image, kernel].tolist() for kernel in KERNELS)]
        blocks = [matrix(one, width=1) for one in shown]
        heads = ["image", *KERNELS]
        lines.append("     ".join(h.ljust(len(b[0])) for h, b in zip(heads, blocks, strict=True)))
        lines += side_by_side(blocks, [" " * 5] * len(KERNELS))
        lines.append("")
    lines.append("strongest output".ljust(20) + "".join(f"{kernel:>12}" for kernel in KERNELS))
    for image in IMAGES:
        strongest = [plain(found[image, kernel].max().item()) for kernel in KERNELS]
        lines.append(f"  on the {image}".ljust(20) + "".join(f"{s:>12}" for s in strongest))
    return Lesson("\n".join(lines), lambda: _draw(found))


def _draw(found: dict[tuple[str, str], Tensor]) -> Figure:
    figure = Figure(figsize=(9, 7), layout="constrained")
    axes = figure.subplots(len(IMAGES) + 1, len(KERNELS) + 1)
    axes[0, 0].set_axis_off()
    text = (
        "each kernel on\neach image\n\nthe darkest red is 1 in\nimages and kernels, and\n"
        "the largest number of\nits row in outputs"
    )
    axes[0, 0].text(0.5, 0.5, text, ha="center", va="center", fontsize=11, color=INK)
    for column, (name, kernel) in enumerate(KERNELS.items(), start=1):
        show_matrix(axes[0, column], kernel, f"kernel: {name}")
    for row, image in enumerate(IMAGES, start=1):
        show_matrix(axes[row, 0], _pixels(IMAGES[image]), f"image: {image}")
        largest = max(found[image, name].max().item() for name in KERNELS)
        for column, name in enumerate(KERNELS, start=1):
            maps = found[image, name]
            title = f"strongest: {plain(maps.max().item())}"
            show_matrix(axes[row, column], maps.tolist(), title, largest=largest)
    return figure


def _pixels(rows: str) -> list[list[int]]:
    return [[int(pixel == "#") for pixel in row] for row in rows.split()]
