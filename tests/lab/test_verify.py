"""`verify`: the report, invalid options, and the command `cnntrain verify`."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from correct_convolutions import FourierInFloat32
from forked import run_command
from torch import nn

from cnntrain.config import ConfigError, compose
from cnntrain.conv import BACKENDS, Im2colConv2d, NaiveConv2d
from cnntrain.lab.verify import verify
from cnntrain.lab.verify.cases import random_cases
from cnntrain.lab.verify.suite import CHECKS


class Unfolding(nn.Conv2d):
    """A convolution by ``F.unfold``, whose backward is autograd's."""

    def both(self):
        return {"same": (None, None), "valid": (0, 0)}.get(self.padding, self.padding)

    def forward(self, input):
        x = input if input.dim() == 4 else input[None]
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        amounts = []
        for k, d, p in zip(self.kernel_size, self.dilation, self.both(), strict=True):
            before, after = (d * (k - 1) // 2, (d * (k - 1) + 1) // 2) if p is None else (p, p)
            amounts = [before, after, *amounts]
        if any(amounts):
            x = F.pad(x, amounts, mode)
        size = [
            (n - d * (k - 1) - 1) // s + 1
            for n, d, k, s in zip(
                x.shape[2:], self.dilation, self.kernel_size, self.stride, strict=True
            )
        ]
        columns = F.unfold(x, self.kernel_size, self.dilation, 0, self.stride)
        columns = columns.unflatten(1, (self.groups, -1))  # (N, groups, K, OH * OW)
        y = self.weight.flatten(1).unflatten(0, (self.groups, -1)) @ columns
        y = y.flatten(1, 2).unflatten(2, size)
        y = y if self.bias is None else y + self.bias[:, None, None].to(y.dtype)
        return y if input.dim() == 4 else y[0]


class UndeclaredFourier(FourierInFloat32):
    rounding_budget = 4.0
    exact_on_integers = True
    spreads_non_finite = False


def test_a_convolution_by_unfold_fails_only_in_errors_and_half_types():
    """F.fold adds windows, and matmul's gradient images, in the input's type."""
    (errors,) = verify(Unfolding, short=True, only="errors").lines
    call = "Unfolding(3, 4, 3)(torch.zeros(6, 6))"
    assert errors.failure == f"{call}: raises ValueError, not RuntimeError"
    for only in ("float16", "float32", "random layers", "memory formats", "no state"):
        report = verify(Unfolding, short=True, cases=10, only=only)
        failed = {line.name for line in report.lines if not line.passed}
        in_half = {
            f"{q} gradient, {t}" for q in ("input", "weight") for t in ("bfloat16", "float16")
        }
        assert failed == (in_half if only == "float16" else set())


@pytest.mark.parametrize("only", ["float32", "12-bit integers", "NaN, Inf and -0.0"])
def test_an_algorithm_must_declare_its_limits(only):
    report = verify(UndeclaredFourier, short=True, cases=10, only=f"output, {only}")
    assert [line.passed for line in report.lines] == [False]


# The report.


def test_cases_and_seed():
    def of(seed):
        return verify(NaiveConv2d, only="output, random layers", cases=7, seed=seed).lines

    assert [line.cases for line in of(5)] == [7]
    assert of(5) == of(5)
    assert of(5)[0].error != of(6)[0].error
    whole, short = (verify(NaiveConv2d, only="empty", short=short) for short in (False, True))
    assert (whole.options["cases"], short.options["cases"]) == (1000, 200)


def test_only_takes_part_of_a_name():
    report = verify(NaiveConv2d, cases=3, only="Weight gradient, ra")
    assert [line.name for line in report.lines] == ["weight gradient, random layers"]
    assert report.summary().startswith(
        "cnntrain.conv.naive.NaiveConv2d passes the 1 check run, of 60 "
        "(only=Weight gradient, ra, cases=3, "
    )


def test_every_line_has_a_unit():
    units = {check.unit for check in CHECKS}
    assert units == {"relative", "absolute", "sqrt(K)uS", "roundings", "elements", "failures"}


def test_the_short_form_has_every_check():
    names = [name for check in CHECKS for name in check.lines]
    assert len(names) == len(set(names)) == 60
    report = verify(BACKENDS["native"], short=True, cases=5)
    assert [line.name for line in report.lines] == names
    assert all(line.cases for line in report.lines)
    assert report.passed
    assert re.fullmatch(
        r"\S+ passes all 60 checks \(short=true, cases=5, \d+ s\)", report.summary()
    )


class Raising(nn.Conv2d):
    def forward(self, input):
        raise KeyError("no kernel for this\nsecond line")


class WrongOnIntegers(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        y = super()._conv_forward(input, weight, bias)
        return y if input.is_floating_point() else 2 * y


class Tangent(torch.autograd.Function):
    """The identity, with a wrong factor in forward mode alone."""

    generate_vmap_rule = True
    forward = staticmethod(lambda y: y.clone())
    setup_context = staticmethod(lambda ctx, inputs, output: None)
    backward = staticmethod(lambda ctx, g: g)
    jvp = staticmethod(lambda ctx, tangent: 1.1 * tangent)


class WrongTangent(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        return Tangent.apply(super()._conv_forward(input, weight, bias))


class FloatsOnly(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        if not input.is_floating_point():
            raise NotImplementedError("floating point only")
        return super()._conv_forward(input, weight, bias)


@pytest.mark.parametrize(
    ("backend", "short", "use"),
    [(WrongOnIntegers, True, "integers"), (WrongTangent, False, "`jvp`, `jacfwd`")],
)
def test_a_wrong_number_in_an_optional_use_is_a_failure(backend, short, use):
    (line,) = verify(backend, only="uses of", short=short).lines
    assert line.failed >= 1
    assert f", {use}: " in line.failure


def test_an_unsupported_optional_use_is_a_note():
    (line,) = verify(FloatsOnly, only="uses of", short=True).lines
    assert line.failed == 0
    assert "integers: NotImplementedError: floating point only" in line.notes


def test_an_exception_fails_a_check_and_the_others_run():
    output = verify(Raising, short=True, cases=2, only="output, random").lines[0]
    assert (output.cases, output.failed, output.error) == (2, 2, float("inf"))
    first = next(random_cases(0, 1)).call("Raising")
    assert output.failure == f"{first}: KeyError: 'no kernel for this\\nsecond line'"
    report = verify(Raising, short=True, only="co")
    by_name = {line.name: line for line in report.lines}
    assert by_name["constructor and initial weights"].passed
    assert not report.passed


def subclass_of(base):
    class Made(base):
        def __init__(self, *arguments, plus=1.0, **options):
            super().__init__(*arguments, **options)
            self.plus = plus

        def _conv_forward(self, input, weight, bias):
            return super()._conv_forward(input, weight, bias) + self.plus

    return Made


FromAFunction = subclass_of(nn.Conv2d)


@pytest.mark.parametrize("backend", [FromAFunction, partial(FromAFunction, plus=-3.0)])
def test_the_line_that_reproduces_a_failure(backend, capsys):
    """Options of a config are in it, and a class made by a function call has its module's name."""
    (line,) = verify(backend, only="12-bit", short=True).lines[:1]
    exec(line.rerun, {})
    shown = capsys.readouterr().out.splitlines()
    assert line.failure.endswith(f": {shown[0]}")


def test_the_report_as_json(tmp_path):
    file = tmp_path / "report.json"
    backend = partial(Im2colConv2d, max_column_mib=1)
    report = verify(backend, cases=4, seed=3, only="random", json=file)
    found = json.loads(file.read_text())
    assert found["passed"] is True
    assert found["backend"] == "cnntrain.conv.im2col.Im2colConv2d"
    assert found["options"]["backend"] == {"max_column_mib": 1}
    assert (found["options"]["cases"], found["options"]["seed"]) == (4, 3)
    assert found["versions"]["torch"] == torch.__version__
    assert [line["error"] for line in found["lines"]] == [line.error for line in report.lines]
    raising = json.loads(verify(Raising, cases=1, only="output, random").json())
    assert (raising["passed"], raising["lines"][0]["error"]) == (False, None)
    assert raising["lines"][0]["failure"].startswith("Raising(")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cases": 0}, "cases=0: must be 1 or more"),
        ({"only": "gradeint"}, "only=gradeint: no check has this in its name; there is "),
        ({"device": "tpu0"}, "device=tpu0: must be cpu, cuda"),
        ({"device": "meta"}, "device=meta: must be cpu, cuda"),
        ({"device": "cuda:99"}, "device=cuda:99: PyTorch finds"),
        ({"json": Path("/nowhere/a")}, "json=/nowhere/a: cannot be written: No such file"),
        ({"json": Path("/")}, "json=/: cannot be written: Is a directory"),
    ],
)
def test_invalid_options(options, message):
    with pytest.raises(ConfigError) as caught:
        verify(NaiveConv2d, **options)
    assert caught.value.problems[0].startswith(message)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["backend=im2coll"], "backend=im2coll: backend has no choice 'im2coll'; did you mean"),
        (["cases=-1"], "cases=-1: input should be greater than 0"),
        (["cases=many"], "cases=many: input should be a valid integer"),
        (["short=maybe"], "short=maybe: input should be a valid boolean"),
        (["shrot=true"], "shrot=true: there is no option 'shrot'; did you mean 'short'?"),
        (["seed=-1"], "seed=-1: input should be greater than or equal to 0"),
        (["+report=3"], "report=3: input should be callable"),
        (["model=lenet5"], "model=lenet5: there is no option 'model'"),
    ],
)
def test_mistakes_on_the_command_line(overrides, message):
    with pytest.raises(ConfigError) as caught:
        compose(overrides, name="verify")
    assert len(caught.value.problems) == 1
    assert caught.value.problems[0].startswith(message)


def test_verifying_restores_settings():
    before = torch.get_rng_state(), torch.get_num_threads(), torch.backends.cudnn.allow_tf32
    verify(NaiveConv2d, only="bitwise")
    after = torch.get_rng_state(), torch.get_num_threads(), torch.backends.cudnn.allow_tf32
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


# The command.

MINE = """
from torch import nn

class Mine(nn.Conv2d):
    pass

class Twice(nn.Conv2d):
    def forward(self, input):
        y = super().forward(input)
        return y if self.bias is None else y + self.bias[:, None, None]
"""


@pytest.fixture
def command(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`cnntrain verify <arguments>` in a folder with a user's own classes in it."""
    (tmp_path / "mypkg.py").write_text(MINE)

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return run_command(["verify", *arguments], tmp_path)

    return run


def test_a_correct_class_of_the_user(command, tmp_path):
    options = ["short=true", "cases=5", "json=-", "only=random layers"]
    done = command("backend._target_=mypkg.Mine", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["passed"] is True
    assert report["backend"] == "mypkg.Mine"
    assert (len(report["lines"]), report["total"]) == (4, 60)
    assert done.stderr == ""
    assert [p.name for p in tmp_path.iterdir()] == ["mypkg.py"]


def test_a_faulty_class_of_the_user(command, tmp_path, monkeypatch, capsys):
    options = ["backend._target_=mypkg.Twice", "only=random layers", "cases=30", "seed=4"]
    done = command(*options, "json=report.json")
    assert done.returncode == 1, done.stderr
    head, output, rerun, *gradients, bias, bias_again, _, verdict = done.stdout.splitlines()
    assert head.split() == ["check", "cases", "worst", "error", "budget", "unit"]
    row = (
        r"output, random layers +30 +[\d.]+ +1e-12 +relative  "
        r"FAILS on (\d+), the smallest (.*): (output is .* at .*, not .*)"
    )
    number, case, wrong = re.fullmatch(row, output).groups()
    with_bias = [case for case in random_cases(4, 30) if case.bias]
    smallest = min(with_bias, key=lambda case: case.elements).call("Twice")
    assert (int(number), case) == (len(with_bias), smallest)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mypkg", raising=False)
    exec(rerun.removeprefix("  to reproduce: "), {})
    monkeypatch.delitem(sys.modules, "mypkg")
    assert capsys.readouterr().out.splitlines()[0] == wrong
    assert bias.startswith("bias gradient, random layers ")
    assert bias_again.startswith("  to reproduce: ")
    good = r"(input|weight|bias) gradient, random layers +\d+ +[\d.e-]+ +1e-12 +relative  ok"
    assert [re.fullmatch(good, line) is not None for line in gradients] == [True, True]
    how = r"\(only=random layers, cases=30, \d+ s\)"
    assert re.fullmatch(rf"mypkg\.Twice fails 2 of the 4 checks run, of 60 {how}", verdict)
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["passed"], len(report["lines"]), report["total"]) == (False, 4, 60)
    assert report["lines"][0]["failure"].startswith(f"{case}: {wrong}")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (["backend=im2coll", "sedd=1"], ["backend=im2coll: ", "sedd=1: "]),
        (
            ["json=nowhere/report.json"],
            ["json=nowhere/report.json: cannot be written: No such file"],
        ),
        (["backend=im2col,naive", "-m"], ["-m: verify takes one backend"]),
    ],
)
def test_mistakes_on_the_command_line_of_a_process(command, tmp_path, arguments, messages):
    done = command(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert all(part in done.stderr for part in messages), done.stderr
    assert "Traceback" not in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["mypkg.py"]


def test_help_names_every_option_and_needs_no_torch(tmp_path):
    code = (
        "import sys; sys.argv = ['cnntrain', 'verify', '--help']\n"
        "from cnntrain.commands import main\n"
        "try:\n    main()\n"
        "finally:\n    print('torch' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.splitlines()[-1] == "False", done.stderr
    assert all(name in done.stdout for name in BACKENDS)
    for option in ("seed", "cases", "short", "only", "device", "json"):
        assert f"\n{option}: " in done.stdout
