"""The capability table: the docs show what the probes find, and the probes find faults."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from cnntrain.conv import Conv2d, Im2colConv2d, NaiveConv2d
from cnntrain.conv.naive import Naive
from cnntrain.lab.capabilities import CAPABILITIES, LIMITS, attempt, derivatives, table, values
from cnntrain.lab.capabilities.twins import OPTIONS

PAGE = Path(__file__).parents[2] / "docs/convolutions.md"
COMMAND = "python -m cnntrain.lab.capabilities docs/convolutions.md"
MARKED = re.compile(r"<!-- capabilities -->\n(.*)<!-- /capabilities -->\n", re.DOTALL)


def test_the_readme_shows_what_the_probes_find():
    (shown,) = MARKED.findall(PAGE.read_text(encoding="utf-8"))
    assert shown == table(), (
        f"the table in docs/convolutions.md is outdated; write it anew: {COMMAND}"
    )


SHAPES = {  # by which im2col chooses how to compute
    "no groups": {"groups": 1},
    "depthwise": {"groups": 4, "out_channels": 4},
    "a pixel": {"kernel_size": 1, "groups": 1, "dilation": 1},
    "the whole image": {"kernel_size": (3, 7), "groups": 1, "dilation": 1},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_im2col_can_whatever_the_shape(shape, monkeypatch):
    for option, value in SHAPES[shape].items():
        monkeypatch.setitem(OPTIONS, option, value)
    for name, probe in CAPABILITIES.items():
        if probe not in LIMITS:
            assert attempt(probe, Im2colConv2d) == "", name


class Off(nn.Conv2d):
    """Wrong by a twentieth, and else able to do whatever nn.Conv2d can."""

    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, weight, bias) * 1.05


class Unable(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        raise NotImplementedError("not written\nyet")


NO_VALUES = {derivatives.second_derivatives, values.shapes_without_numbers}


@pytest.mark.parametrize("probe", [p for p in CAPABILITIES.values() if p not in NO_VALUES])
def test_every_probe_sees_a_wrong_number(probe):
    with pytest.raises(AssertionError):
        attempt(probe, Off)


@pytest.mark.parametrize("probe", CAPABILITIES.values())
def test_a_backend_that_cannot_is_told_from_one_that_is_wrong(probe):
    reason = attempt(probe, Unable)
    assert "not written yet" in reason or reason.startswith("Unsupported: Observed exception")
    assert "\n" not in reason


def backend_of(name, function):
    """NaiveConv2d with one of its three functions exchanged."""
    algorithm = type("Faulty", (Naive,), {name: function})()
    return type("FaultyConv2d", (Conv2d,), {"algorithm": algorithm})


FAULTS = {
    "input gradient of another sign": (
        backend_of("grad_input", lambda self, *args: -Naive.grad_input(self, *args)),
        {"first_derivatives", "second_derivatives", "hessians", "hooks", "repeatable"},
    ),
    "weight gradient of the first image only": (
        backend_of(
            "grad_weight", lambda self, g, x, *how: Naive.grad_weight(self, g[:1], x[:1], *how)
        ),
        {"first_derivatives", "vmap_of_grad", "checkpointing", "compile_whole", "half_precision"},
    ),
    "groups mixed": (
        backend_of(
            "forward",
            lambda self, x, w, how: Naive.forward(self, x.flip(1) if how.groups > 2 else x, w, how),
        ),
        {"vmap_weights", "vmap_of_grad"},
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_wrong_where_it_shows(fault):
    backend, seen_by = FAULTS[fault]
    for probe in CAPABILITIES.values():
        if probe.__name__ in seen_by:
            with pytest.raises(AssertionError):
                attempt(probe, backend)


def test_second_derivatives_that_are_wrong():
    class Scale(torch.autograd.Function):  # the identity, and its derivative forgets the graph
        @staticmethod
        def forward(ctx, y):
            return y.clone()

        @staticmethod
        def backward(ctx, g):
            return g.detach()

    class Forgetful(nn.Conv2d):
        def _conv_forward(self, *args):
            return Scale.apply(super()._conv_forward(*args))

    attempt(derivatives.first_derivatives, Forgetful)
    with pytest.raises(AssertionError):
        attempt(derivatives.second_derivatives, Forgetful)


def test_a_table_of_ones_own_backend(monkeypatch):
    few = {
        "gradients": derivatives.first_derivatives,
        "layout": values.channels_last_output,
        "strides": values.any_strides,
    }
    monkeypatch.setattr("cnntrain.lab.capabilities.CAPABILITIES", few)
    assert table({"mine": NaiveConv2d, "none": Unable}).splitlines() == [
        "|  | `mine` | `none` | why not |",
        "| --- | --- | --- | --- |",
        "| gradients | yes | no | NotImplementedError: not written yet |",
        f"| layout | no | no | {LIMITS[values.channels_last_output]} |",
        "| strides | yes | no | NotImplementedError: not written yet |",
    ]
    with pytest.raises(AssertionError):
        table({"off": Off})


def test_the_command_rewrites_only_what_is_between_the_markers(tmp_path):
    file = tmp_path / "page.md"
    file.write_text("before\n<!-- capabilities -->\nold\n<!-- /capabilities -->\nafter\n")
    code = (
        "import sys, runpy, cnntrain.lab.capabilities as c; c.CAPABILITIES.clear();"
        "runpy.run_module('cnntrain.lab.capabilities', run_name='__main__', alter_sys=False)"
    )
    command = [sys.executable, "-c", code, str(file)]
    subprocess.run(command, check=True)
    before, new, after = re.split(r"<!-- /?capabilities -->\n", file.read_text())
    assert (before, after) == ("before\n", "after\n")
    assert new.startswith("|  | `native` | `im2col` | `naive` | why not |\n| --- |")
    file.write_text("no markers\n")
    refused = subprocess.run(command, capture_output=True, text=True)
    assert refused.returncode == 1
    assert refused.stderr.splitlines()[-1].startswith(f"{file} has no lines <!-- capabilities -->")
    assert file.read_text() == "no markers\n"
