"""Benchmark: times, rates, memory and errors against values derived by hand."""

import contextlib
import csv
import dataclasses
import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from cnntrain.config import ConfigError
from cnntrain.lab.benchmark import BenchmarkReport, benchmark, measure, plot, print_report
from cnntrain.lab.benchmark.layers import layer, layer_sets
from cnntrain.lab.benchmark.measure import (
    ExtraMemory,
    PassTime,
    TimedConv,
    extra_memory,
    time_in_turns,
)
from cnntrain.lab.benchmark.report import Measurement

MIB = 2**20
SMALL = {"in_channels": 2, "out_channels": 4, "kernel_size": 3, "size": 8}
QUICK: dict[str, Any] = {"rounds": 2, "min_turn_ms": 0}


def flat(report: BenchmarkReport, **wanted: Any) -> list[dict[str, Any]]:
    """The rows whose columns have these values."""
    return [row for row in report.rows if all(row[key] == v for key, v in wanted.items())]


def shown(report: BenchmarkReport) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        print_report(report)
    return out.getvalue()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"kernal_size": 3},
            "shape.kernal_size: there is no option 'kernal_size'; did you mean 'kernel_size'?",
        ),
        ({"size": None}, "shape.size=null: input should be a valid integer, or "),
        ({"size": [8, 8, 8]}, "shape.size=[8, 8, 8]: input should be a valid integer, or tuple"),
        ({"stride": 0}, "shape.stride=0: input should be greater than 0"),
        ({"kernel_size": 2.5}, "shape.kernel_size=2.5: input should be a valid integer, or"),
        ({"in_channels": True}, "shape.in_channels=true: input should be a valid integer"),
        ({"bias": "no"}, "shape.bias=no: input should be a valid boolean"),
        ({"padding": -1}, "shape.padding=-1: input should be greater than or equal to 0"),
        ({"padding": "sam"}, "shape: Invalid padding string 'sam'"),
        ({"groups": 3}, "shape: in_channels must be divisible by groups"),
        ({"padding_mode": "mirror"}, "shape.padding_mode=mirror: input should be 'zeros', "),
        ({"kernel_size": 9}, "shape: "),
        ({"padding": "same", "stride": 2}, "shape: padding='same' is not supported for strided"),
    ],
)
def test_a_wrong_shape_is_rejected(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        layer({**SMALL, **changed})
    (problem,) = caught.value.problems
    assert problem.startswith(message)
    assert "\n" not in problem


def test_a_wrong_set_is_rejected() -> None:
    wrong = {
        "a": {"layer": []},
        "b": {"batch_sizes": [0], "layers": [SMALL]},
        "c": {"batch_sizes": [1]},
        "d": [SMALL, {**SMALL, "groups": 3}],
        "e": nn.Linear(2, 2),
        "f": nn.Conv2d(3, 3, 3),
    }
    with pytest.raises(ConfigError) as caught:
        layer_sets(wrong, (1, 8, 2))
    a, b, c, d, e, f = caught.value.problems
    assert a == "layers.a: it has no key 'layer'; did you mean 'layers'?"
    assert b == "layers.b.batch_sizes=[0]: input should be greater than 0"
    assert c.startswith("layers.c.layers: must be a list of layers, each as '{in_channels: 64,")
    assert d.startswith("layers.d[1]: in_channels must be divisible")
    assert e == "model: e has no nn.Conv2d to time"
    assert f.startswith("in_shape=[1, 8, 2]: ")


class Allocates(torch.autograd.Function):
    """Zeros; allocates 8 MiB in the forward, keeps 3 MiB, and allocates 16 MiB in the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor, size: tuple[int, ...]) -> Tensor:
        passing = torch.empty(8 * MIB, dtype=torch.uint8)
        ctx.save_for_backward(x, w, b)
        del passing
        ctx.kept = torch.empty(3 * MIB, dtype=torch.uint8)
        return x.new_zeros(size)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        passing = torch.empty(16 * MIB, dtype=torch.uint8)
        del passing
        return *(torch.zeros_like(t) for t in ctx.saved_tensors), None


class AllocatesConv2d(nn.Conv2d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        size = F.conv2d(input.to("meta"), weight.to("meta")).shape
        return Allocates.apply(input, weight, bias, size)


def test_memory_to_the_byte() -> None:
    conv, x = AllocatesConv2d(2, 4, 3), torch.randn(5, 2, 8, 8, requires_grad=True)
    subject = TimedConv(conv, x, torch.randn(5, 4, 6, 6))
    assert extra_memory(subject) == ExtraMemory(8 * MIB, (3 + 16) * MIB, 3 * MIB)
    alone = TimedConv(conv, x.detach(), None)
    assert extra_memory(alone) == ExtraMemory(8 * MIB, None, None)


def test_scratch_memory_of_native_is_counted() -> None:
    """In float64 PyTorch unrolls the whole batch: N * C*9 * OH*OW numbers of 8 bytes."""
    conv = nn.Conv2d(16, 16, 3, padding=1).double()
    subject = TimedConv(conv, torch.randn(4, 16, 16, 16, dtype=torch.float64), None)
    assert extra_memory(subject).forward >= 4 * 16 * 9 * 16 * 16 * 8


class Clock:
    """A clock that only fake convolutions advance."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


class Ticks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, tick: Callable[[], None]) -> Tensor:
        ctx.tick = tick
        return y.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        ctx.tick()
        return g, None


@pytest.fixture
def fake_conv(monkeypatch: pytest.MonkeyPatch) -> Callable[..., type[nn.Conv2d]]:
    """Convolutions whose forward and backward take given seconds on a fake clock."""
    clock = Clock()
    monkeypatch.setattr(measure, "time", clock)

    def make(name: str, forward: float, backward: float) -> type[nn.Conv2d]:
        class Fake(nn.Conv2d):
            def _conv_forward(self, input: Tensor, weight: Tensor, bias: Any) -> Tensor:
                clock.now += forward
                y = super()._conv_forward(input, weight, bias)
                return Ticks.apply(y, lambda: setattr(clock, "now", clock.now + backward))

        Fake.__name__ = name
        return Fake

    return make


def test_times_rates_and_ratios_by_a_fake_clock(fake_conv: Callable[..., type[nn.Conv2d]]) -> None:
    """2*4*9*36 = 2,592 MACs for an image of 8x8, 5 images: 25,920 FLOP forward."""
    quick, slow = fake_conv("Quick", 0.001, 0.003), fake_conv("Slow", 0.004, 0.008)
    report = benchmark({"one": [SMALL]}, [quick, slow], batch_sizes=[5], rounds=3, min_turn_ms=10)
    one, other = flat(report)
    assert report.meta["baseline"] == "Quick"  # the first, since native is not there
    assert one["macs_per_image"] == 2592
    assert [one[f"{part}_ms"] for part in ("forward", "backward", "total")] == pytest.approx(
        [1, 3, 4]
    )
    assert [other[f"{part}_ms"] for part in ("forward", "backward")] == pytest.approx([4, 8])
    assert one["forward_gflops"] == pytest.approx(25_920 / 1e-3 / 1e9)
    assert one["total_gflops"] == pytest.approx(3 * 25_920 / 4e-3 / 1e9)
    assert (one["ratio"], other["ratio"]) == (1, pytest.approx(3))
    assert (other["ratio_q1"], other["ratio_q3"]) == pytest.approx((3, 3))
    assert one["passes"] * 4 >= 10  # ms: as many as a turn needs
    assert other["passes"] == 1
    assert (one["rounds"], other["rounds"]) == (3, 3)


def test_the_forward_alone(fake_conv: Callable[..., type[nn.Conv2d]]) -> None:
    makers = [fake_conv("Quick", 0.001, 0.003), fake_conv("Slow", 0.004, 0.008)]
    report = benchmark({"one": [SMALL]}, makers, backward=False, **QUICK)
    one, other = flat(report)
    assert other["ratio"] == pytest.approx(4)
    assert one["total_ms"] == pytest.approx(1)
    assert one["total_gflops"] == one["forward_gflops"]
    absent = ["backward_ms", "total_extra_bytes", "kept_bytes", "gradient_error"]
    assert [one[column] for column in absent] == [None] * 4
    assert "total" not in shown(report)


def measured(backend: str, seconds: list[float], batch_size: int = 2, **kind: Any) -> Measurement:
    count = kind.pop("count", 1)
    (found,) = layer_sets({"s": [{**SMALL, **kind}] * count}, (1, 1, 1))
    both = [PassTime(s / 4, 3 * s / 4) for s in seconds]
    return Measurement("s", found.layers[0], batch_size, "float32", backend, both, seconds, 1)


def report_of(*rows: Measurement) -> BenchmarkReport:
    """The layers of equal rows are one object, as in a benchmark."""
    layers = {found.layer.shape: found.layer for found in rows}
    return BenchmarkReport(
        {"baseline": "native", "backward": True},
        [dataclasses.replace(found, layer=layers[found.layer.shape]) for found in rows],
    )


def test_ratios_are_taken_within_a_round_and_sums_over_the_layers() -> None:
    wide = {"out_channels": 8, "count": 2}
    report = report_of(
        measured("native", [1.0, 2.0, 4.0]),
        measured("mine", [2.0, 2.0, 12.0]),
        measured("native", [1.0, 1.0, 1.0], **wide),
        measured("mine", [3.0, 5.0, 1.0], **wide),
    )
    assert [report.rows[1][f"ratio{q}"] for q in ("", "_q1", "_q3")] == [2, 1.5, 2.5]  # of 2, 1, 3
    native, other = report.sums
    assert native["total_ms"] == 4000  # of 1 + 2, 2 + 2, 4 + 2
    assert other["total_ms"] == 12_000  # of 2 + 6, 2 + 10, 12 + 2
    assert other["ratio"] == 8 / 3  # of 8 / 3, 12 / 4, 14 / 6


def test_the_geometric_mean_of_the_ratios_of_the_sums() -> None:
    rows = []
    for batch_size, factor in [(2, 2.0), (4, 8.0)]:
        rows.append(measured("native", [1.0, 2.0], batch_size))
        rows.append(measured("im2col", [3.0 * factor, 6.0 * factor], batch_size))
    report = report_of(*rows)
    report.meta.update(gpu="one", threads=1, memory_format="any", rounds=2, versions={"torch": "2"})
    (mean,) = (line for line in shown(report).splitlines() if line.startswith("geometric mean"))
    assert mean.split() == ["geometric", "mean", "12.0"]  # of 6 and 24


def test_a_set_with_a_layer_that_failed_has_no_sum() -> None:
    failed = dataclasses.replace(measured("mine", []), problem="no")
    report = report_of(measured("native", [1.0]), failed)
    assert [found["ratio"] for found in report.sums] == [1, None]


def test_turns_are_shuffled_and_an_implementation_that_raises_is_removed() -> None:
    turns: list[str] = []

    class Recording(nn.Conv2d):
        name = ""

        def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            turns.append(self.name)
            if self.name == "b" and turns.count("b") == 3:
                raise ValueError("three is enough")
            return super()._conv_forward(input, weight, bias)

    subjects = {}
    for name in "abc":
        subjects[name] = TimedConv(Recording(2, 4, 3), torch.zeros(1, 2, 8, 8), None)
        subjects[name].conv.name = name
    ticks: list[None] = []
    times, raised = time_in_turns(
        subjects, dict.fromkeys("abc", 1), 40, random.Random(0), lambda: ticks.append(None)
    )
    assert {name: len(found) for name, found in times.items()} == {"a": 40, "c": 40}
    assert [str(error) for error in raised.values()] == ["three is enough"]
    assert list(raised) == ["b"]
    assert len(ticks) == 40
    later = [name for name in turns[9:] if name != "b"]
    rounds = {"".join(later[i : i + 2]) for i in range(len(later) % 2, len(later), 2)}
    assert rounds == {"ac", "ca"}


class Wrong(nn.Conv2d):
    """Output and gradients are 10 % too large."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return 1.1 * super()._conv_forward(input, weight, bias)


class Raises(nn.Conv2d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        raise NotImplementedError("not for you\nin a second line")


class Misshapen(nn.Conv2d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, weight, bias)[..., :-1]


class Infinite(nn.Conv2d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, weight, bias) / 0


@pytest.fixture(scope="module")
def report() -> BenchmarkReport:
    sets = {"a": [SMALL, {**SMALL, "stride": 2}], "b": {"batch_sizes": [3], "layers": [SMALL]}}
    entries = ["native", "im2col", "naive", "seven_loops", Wrong, Raises, Misshapen, Infinite]
    dtypes: Any = ["float32", "bfloat16"]
    return benchmark(sets, entries, batch_sizes=[2, 4], dtypes=dtypes, **QUICK)


def test_a_row_for_every_combination(report: BenchmarkReport) -> None:
    found = [
        (r["set"], r["layer"], r["batch_size"], r["dtype"], r["backend"]) for r in flat(report)
    ]
    names = ["native", "im2col", "naive", "seven_loops", "Wrong", "Raises", "Misshapen", "Infinite"]
    plain, strided = "2->4 3x3 on 8x8", "2->4 3x3 s2 on 8x8"
    expected = [
        (name, layer, batch_size, dtype, backend)
        for name, layers in [("a", [plain, strided]), ("b", [plain])]
        for dtype in ["float32", "bfloat16"]
        for batch_size in [2, 4]  # the option, in place of the set's own 3
        for layer in layers
        for backend in names
    ]
    assert found == expected
    for good in ("native", "im2col", "naive"):
        for found_row in flat(report, backend=good):
            assert all(value is not None for value in found_row.values()), found_row
            assert found_row["problem"] == ""


def test_errors_against_float64(report: BenchmarkReport) -> None:
    for r in flat(report, dtype="float32"):
        if r["backend"] in ("native", "im2col", "naive"):
            assert 0 < r["output_error"] < 2e-6
            assert 0 <= r["gradient_error"] < 2e-6
        elif r["backend"] == "Wrong":
            assert r["output_error"] == pytest.approx(0.1, rel=1e-4)
            assert r["gradient_error"] == pytest.approx(0.1, rel=1e-4)
    for r in flat(report, dtype="bfloat16", backend="native"):
        assert 1e-4 < r["output_error"] < 1e-2


def test_failures_are_reported(report: BenchmarkReport) -> None:
    problems = {
        name: {r["problem"] for r in flat(report, backend=name)} for name in report.backends
    }
    assert problems["Raises"] == {"NotImplementedError: not for you"}
    assert problems["Infinite"] == {"RuntimeError: its results are not finite"}
    assert "RuntimeError: its output is [2, 4, 6, 5], not [2, 4, 6, 6]" in problems["Misshapen"]
    assert problems["seven_loops"] == {"forward only: its output has no gradient"}
    loops = flat(report, backend="seven_loops", dtype="float32")[0]
    assert loops["forward_ms"] > 0
    assert (loops["total_ms"], loops["ratio"], loops["backward_ms"]) == (None, None, None)
    assert loops["output_error"] < 2e-6
    text = shown(report)
    assert "Raises, 2->4 3x3 on 8x8, batch 2, float32: NotImplementedError: not for you" in text


def test_files_agree(report: BenchmarkReport, tmp_path: Path) -> None:
    report.write(tmp_path)
    with (tmp_path / "results.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    content = json.loads(
        (tmp_path / "results.json").read_text(), parse_constant=lambda name: pytest.fail(name)
    )
    assert len(lines) == len(content["rows"]) == len(report.rows)
    for line, found in zip(lines, content["rows"], strict=True):
        assert {k: "" if v is None else str(v) for k, v in found.items()} == line
    meta = content["meta"]
    assert torch.__version__.startswith(meta["versions"]["torch"])
    assert meta["memory_format"] == "contiguous"
    assert meta["threads"] == torch.get_num_threads()
    assert meta["processor"]
    sums = {(s["set"], s["batch_size"], s["dtype"], s["backend"]): s for s in content["sums"]}
    assert sums["a", 2, "float32", "native"]["ratio"] == 1
    assert sums["a", 2, "float32", "Raises"]["total_ms"] is None
    assert len(sums) == 2 * 2 * 2 * 8


def test_a_picture(report: BenchmarkReport, tmp_path: Path) -> None:
    plot(report, tmp_path / "new" / "picture.png")
    with Image.open(tmp_path / "new" / "picture.png") as image:
        image.load()
        assert image.format == "PNG"
        assert 1000 <= image.width <= 2000
        assert 500 <= image.height <= 2000
        colours = {colour for _, colour in image.convert("RGB").getcolors(2**24) or []}
    assert {(0, 0x72, 0xB2), (0xE6, 0x9F, 0)} <= colours  # the first two bars'


def test_nothing_global_is_changed() -> None:
    tiny = torch.tensor([1e-40])
    threads, state, python = torch.get_num_threads(), torch.get_rng_state(), random.getstate()
    seen: dict[str, Any] = {}

    class Recording(nn.Conv2d):
        def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            seen["threads"], seen["flushed"] = torch.get_num_threads(), (tiny * 1).item() == 0
            return super()._conv_forward(input, weight, bias)

    first = benchmark({"a": [SMALL]}, [Recording], threads=2, **QUICK)
    assert seen == {"threads": 2, "flushed": True}
    assert first.meta["threads"] == 2
    assert torch.get_num_threads() == threads
    assert (tiny * 1).item() != 0
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == python
    again = benchmark({"a": [SMALL]}, [Recording], **QUICK)
    other = benchmark({"a": [SMALL]}, [Recording], seed=1, **QUICK)
    errors = [flat(found)[0]["output_error"] for found in (first, again, other)]
    assert errors[0] == errors[1] != errors[2]  # the seed decides the inputs, and nothing else


def test_channels_last_reaches_the_backend() -> None:
    seen: list[bool] = []

    class Recording(nn.Conv2d):
        def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            seen.extend(t.is_contiguous(memory_format=torch.channels_last) for t in (input, weight))
            seen.extend(not t.is_contiguous() for t in (input, weight))
            return super()._conv_forward(input, weight, bias)

    found = benchmark({"a": [SMALL]}, [Recording], memory_format="channels_last", **QUICK)
    assert seen
    assert all(seen)
    assert flat(found)[0]["gradient_error"] < 2e-6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_sizes": []}, "batch_sizes=[]: must be one value or more"),
        ({"batch_sizes": [2, 2]}, "batch_sizes=[2, 2]: must be one value or more, none of them"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        benchmark({"a": [SMALL]}, ["native"], **options)
    assert caught.value.problems[0].startswith(message)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_reported() -> None:
    with pytest.raises(ConfigError, match=r"^device=cuda: this machine has no GPU"):
        benchmark({"a": [SMALL]}, ["native"], device="cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_on_a_gpu() -> None:
    report = benchmark({"a": [SMALL]}, ["native", "im2col"], device="cuda", **QUICK)
    for found in flat(report):
        assert found["problem"] == ""
        assert found["total_ms"] > 0
        assert found["output_error"] < 1e-2
        assert found["total_extra_bytes"] >= found["forward_extra_bytes"] >= 0
    assert report.meta["gpu"]
