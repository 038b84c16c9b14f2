"""Lessons: every number against one derived independently."""

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from finished_runs import command
from PIL import Image

from cnntrain.commands.lesson import LESSONS, main
from cnntrain.config import ConfigError
from cnntrain.conv import BACKENDS
from cnntrain.lab import lessons
from cnntrain.lab.lessons import activations, cost, patterns, window
from cnntrain.lab.lessons.basics import curve, responses
from cnntrain.lab.lessons.im2col import SmallConvolution, small_convolution


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_output_is_strongest_where_pattern_and_kernel_agree(backend: str) -> None:
    strongest = {key: maps.max().item() for key, maps in responses(backend).items()}
    assert strongest == {
        ("diagonal", "diagonal"): 3,
        ("diagonal", "horizontal"): 1,
        ("diagonal", "ring"): 2,
        ("ring", "diagonal"): 2,
        ("ring", "horizontal"): 3,
        ("ring", "ring"): 8,
    }
    ring = responses(backend)["ring", "ring"]
    assert (ring == 8).nonzero().tolist() == [[2, 2]]  # where the ring is
    text = patterns(backend=backend).text.splitlines()
    assert text[-2].split() == ["on", "the", "diagonal", "3", "1", "2"]
    assert text[-1].split() == ["on", "the", "ring", "2", "3", "8"]


def test_activations_and_their_derivatives() -> None:
    x = torch.linspace(-5, 5, 101, dtype=torch.float64)
    grid = x.numpy()
    s = 1 / (1 + np.exp(-grid))
    for name, (values, slopes) in {
        "relu": (np.maximum(grid, 0), (grid > 0).astype(float)),
        "leaky_relu": (np.where(grid > 0, grid, 0.01 * grid), np.where(grid > 0, 1, 0.01)),
        "sigmoid": (s, s * (1 - s)),
        "tanh": (np.tanh(grid), 1 - np.tanh(grid) ** 2),
    }.items():
        found, slope = curve(name, x)
        assert np.abs(found.numpy() - values).max() < 1e-12
        assert np.abs(slope.numpy() - slopes).max() < 1e-12
    lines = activations().text.splitlines()
    assert "sigmoid          0.2500    0.003906" in lines


GEOMETRIES = [
    {},
    {"padding": 1, "stride": 2},
    {"size": (5, 3), "kernel": (3, 2), "padding": (0, 1)},
    {"size": 5, "dilation": 2},
    {"size": 4, "in_channels": 4, "out_channels": 2, "groups": 2, "kernel": 2},
    {"padding": "same", "padding_mode": "reflect"},
    {"padding": 2, "padding_mode": "circular", "size": 3},
    {"padding": (1, 2), "padding_mode": "replicate", "stride": (2, 3)},
    {"kernel": 1, "out_channels": 3},
    {"padding": "same", "kernel": 2},
]


def example(options: dict) -> tuple[torch.nn.Conv2d, SmallConvolution]:
    """A layer, and the lesson's example of it."""
    given = {"size": 4, "in_channels": 1, "out_channels": 1, "kernel": 3, **options}
    height, width = (size, size) if isinstance(size := given.pop("size"), int) else size
    layer = torch.nn.Conv2d(kernel_size=given.pop("kernel"), bias=False, **given)
    output = layer(torch.empty(1, layer.in_channels, height, width))
    return layer, small_convolution(layer, height, width, output.shape[2:])


@pytest.mark.parametrize("options", GEOMETRIES, ids=str)
def test_window_is_the_convolution(options: dict) -> None:
    native, found = example(options)
    native.weight.data = found.weight
    with torch.no_grad():
        assert (native(found.input) == found.output).all()
    assert found.input.flatten().tolist() == list(range(1, found.input.numel() + 1))
    unfolded = torch.nn.functional.unfold(
        found.padded[None], native.kernel_size, native.dilation, 0, native.stride
    )[0]
    assert (found.columns.flatten(0, 1) == unfolded).all()
    for position in range(found.columns.shape[2]):  # the frames are around these numbers
        seen = [[image[y, x] for y, x in found.window(position)] for image in found.padded]
        assert torch.tensor(seen).flatten().tolist() == unfolded[:, position].tolist()


@pytest.mark.parametrize("options", GEOMETRIES, ids=str)
def test_window_shows_every_number(options: dict) -> None:
    _, found = example(options)
    lesson = window(**options)
    lines = lesson.text.splitlines()
    size = found.output.shape
    assert lines[1].endswith(f"= {size[1]}")
    assert lines[2].endswith(f"= {size[2]}")
    formula = lines[1].split("=")[1].replace("floor", "int")
    assert eval(formula) == size[1]  # the numbers that are filled in
    plain = lesson.text.replace("[", " ").replace("]", " ")
    block = plain.split("\ninput")[1].splitlines()[1 : 1 + found.padded.shape[1]]
    assert [[float(n) for n in line.split()] for line in block] == found.padded[0].tolist()
    last = plain.splitlines()[-size[1] :]
    assert [[float(n) for n in line.split()] for line in last] == found.output[-1].tolist()
    product = lesson.text.split("is the product\n")[1].split("\n\n")[0]
    numbers = sorted(
        float(n) for n in product.replace("[", " ").replace("]", " ").split() if n not in "x="
    )
    group = [found.weight.reshape(len(found.columns), -1, found.columns.shape[1])[0]]
    group += [found.columns[0], found.products[0]]
    assert numbers == sorted(torch.cat([part.flatten() for part in group]).tolist())
    assert min(lesson.draw().get_size_inches()) > 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 40}, "there are 1,444 columns of the column matrix, and at most 36 are readable"),
        ({"size": 31, "stride": 31}, "there are 961 numbers of the padded input, and at most 900"),
        ({"kernel": 9, "padding": 3}, "there are 81 rows of the column matrix, and at most 36"),
        ({"padding": 5000, "stride": 5000}, "there are 100,080,016 numbers of the padded input"),
        ({"out_channels": 20000}, "there are 20,000 kernels, and at most 36 are readable"),
        ({"size": 3, "kernel": 5}, "window of 5x5 is larger than the input with its padding, 3x3:"),
        ({"kernel": 100_000}, "window of 100000x100000 is larger than .* 4x4: take a smaller"),
        ({"groups": 2}, "in_channels must be divisible by groups"),
        ({"position": 4}, "position=4: there are 4 windows, 0 to 3"),
        ({"padding": "same", "stride": 2}, "padding='same' is not supported for strided"),
        ({"size": 3, "padding": 3, "padding_mode": "reflect"}, "Padding size should be less than"),
    ],
)
def test_window_rejects_what_is_too_large_or_impossible(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        window(**options)


def panels(**options: Any) -> dict[str, tuple[float, float]]:
    """Positions of the titles in the lesson's picture, in pixels; all of them are inside it."""
    figure = window(**options).draw()
    found = {}
    for axes in figure.axes:
        box = axes._left_title.get_window_extent()
        assert box.x0 >= 0 <= box.y0
        assert box.x1 <= figure.bbox.width
        assert box.y1 <= figure.bbox.height
        title = axes.get_title("left")
        assert title not in found, "two panels have one title"
        found[title] = (box.x0, box.y0)
    return found


def test_panels_of_a_group_are_above_its_product() -> None:
    two = panels(in_channels=4, groups=2, out_channels=4, kernel=2, size=3, padding=1)
    for group, channels in enumerate(((0, 1), (2, 3))):
        titles = {f"input, padded, channel {c}" for c in channels}
        titles |= {f"output, channel {c}" for c in channels}
        titles |= {f"kernel {o}, channel {c}" for o in channels for c in channels}
        below = f"kernels of group {group}, a row each"
        assert titles <= set(two)
        others = [y for title, (_, y) in two.items() if title.endswith(f"channel {3 - group * 3}")]
        for title in titles:  # all above their product, and on one side of the other group
            assert two[title][1] > two[below][1]
            assert {two[title][1] > y for y in others} == {group == 0}
    assert {"columns of group 1, one for each window", "product of group 1"} <= set(two)
    deep = panels(in_channels=4, groups=4, out_channels=4, kernel=1, size=2)
    assert {f"input, channel {c}" for c in range(4)} <= set(deep)
    assert {"kernels of group 3, as a row", "product of group 3"} <= set(deep)


@pytest.mark.parametrize(
    ("options", "padded"),
    [
        ({"padding": "valid"}, False),
        ({"padding": "same", "kernel": 1}, False),
        ({"padding": (0, 1)}, True),
        ({"padding": "same", "kernel": 2}, True),  # on one side only
    ],
)
def test_only_a_padded_input_is_titled_so(options: dict, padded: bool) -> None:
    name = "input, padded" if padded else "input"
    assert {title for title in panels(**options) if title.startswith("input")} == {name}
    assert f"\n{name}: window 0 in [ ]\n" in window(**options).text


def test_patterns_have_one_colour_scale_a_row() -> None:
    figure = patterns().draw()
    axes = np.array(figure.axes).reshape(3, 4)
    for row, largest in ((1, 3), (2, 8)):
        limits = {axes[row, column].images[0].get_clim() for column in (1, 2, 3)}
        assert limits == {(-1.6 * largest, 1.6 * largest)}
    inputs = [axes[0, 1], axes[0, 2], axes[0, 3], axes[1, 0], axes[2, 0]]
    assert {one.images[0].get_clim() for one in inputs} == {(-1.6, 1.6)}
    (note,) = axes[0, 0].texts
    assert "one colour scale" in note.get_text()
    figure.canvas.draw()
    box, place = note.get_window_extent(), axes[0, 1].get_window_extent()
    assert 0 <= box.x0 < box.x1 < place.x0


def test_cost_has_the_macs_of_every_layer() -> None:
    lines = cost(batch_size=8, rounds=2).text.splitlines()
    rows = {line.split()[0]: line.split() for line in lines[3:] if line}
    macs = {  # by hand: outputs times products for each
        "features.0": 28 * 28 * 6 * 25,
        "features.4": 10 * 10 * 16 * 25 * 6,
        "features.8": 128 * 25 * 16,
        "classifier.0": 128 * 84,
        "classifier.3": 84 * 10,
    }
    for name, count in macs.items():
        assert rows[name][2] == f"{count:,}"
        assert rows[name][3] == f"{count / sum(macs.values()):.1%}"
    assert rows["total"][1] == f"{sum(macs.values()):,}"
    assert lines[2].split()[3::2] == list(BACKENDS)
    assert lines[0].endswith(f"forward, {torch.get_num_threads()} threads; in ms")
    for column, _ in enumerate(BACKENDS):  # milliseconds, and the sum of them
        times = [
            float(row[(4 if name in macs else 2) + column * (2 if name in macs else 1)])
            for name, row in rows.items()
            if name != "total"
        ]
        assert float(rows["total"][3 + 2 * column]) == pytest.approx(sum(times), abs=0.02)
        assert all(time > 0 for time in times)


def test_cost_of_other_networks_and_backends(tmp_path: Path) -> None:
    lesson = cost(model="squeezenet1_1", backends=["native", "im2col"], batch_size=2, rounds=1)
    assert "Conv2d" in lesson.text
    lesson.write(tmp_path / "cost.png")
    with pytest.raises(ConfigError, match="model=lenet: model has no choice 'lenet'"):
        cost(model="lenet")
    with pytest.raises(ConfigError, match=r"backends=.*'fft'.*choose from native, im2col, naive"):
        cost(backends=["fft"])
    with pytest.raises(ConfigError, match=r"model=swin_t: .*attn.qkv is never called"):
        cost(model="swin_t", backends=["native"])


def test_command(tmp_path: Path) -> None:  # the other lessons: tests/docs
    done = command("lesson", "window", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    assert done.stdout.splitlines()[-1] == "outputs/lessons/window.png"
    picture = np.asarray(Image.open(tmp_path / "outputs/lessons/window.png").convert("L"))
    assert picture.std() > 10


def test_help_without_importing_torch() -> None:
    script = """import sys
from cnntrain.commands import lesson
for name in lesson.LESSONS:
    sys.argv = ["cnntrain", name, "--help"]
    lesson.main()
assert "torch" not in sys.modules"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in LESSONS:
        assert f"cnntrain lesson {name} [option=value ...]" in done.stdout
        assert inspect.getdoc(getattr(lessons, name)) in done.stdout
        for option, parameter in inspect.signature(getattr(lessons, name)).parameters.items():
            default = parameter.default
            assert f" {option}={'null' if default is None else default} " in done.stdout


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["windw"], "windw: there is no lesson 'windw'; did you mean 'window'?"),
        (["window", "kernl=3"], "kernl=3: window has no option 'kernl'; did you mean 'kernel'?"),
        (["window", "kernel=x"], "kernel=x: input should be a valid integer"),
        (["window", "--size=3"], "--size=3: options have no dashes: option=value"),
        (["window", "size=3", "kernel=5"], "lesson window: the window of 5x5 is larger than the"),
        (["window", "size"], "size: has no value: size=..."),
        (["patterns", "backend=fft"], "backend=fft: choose from native, im2col, naive"),
        (["cost", "rounds=0"], "rounds=0: input should be greater than 0"),
    ],
)
def test_mistakes_are_reported_on_one_line(
    arguments: list[str],
    problem: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["cnntrain", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert problem in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
