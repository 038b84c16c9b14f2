"""Capability table of docs/convolutions.md, and faults in the uses that it lists."""

import re

import make_capabilities_table as capabilities
import pytest
import torch
from make_capabilities_table import LIMITS, table
from torch import nn

from cnntrain.conv import BACKENDS, Conv2d, Im2colConv2d, NaiveConv2d
from cnntrain.conv.naive import Naive
from cnntrain.lab.verify import interface
from cnntrain.lab.verify.interface import USES
from cnntrain.lab.verify.uses import channels_last_output, hooks, meta

SLOW = {"compile_layer", "compile_transforms", "export_any_size"}


@pytest.mark.skipif(torch.__version__ < "2.15", reason="is not traced by older versions")
def test_the_table_of_the_docs():
    page = capabilities.PAGE.read_text(encoding="utf-8")
    shown = page.partition(capabilities.BEGIN)[2].partition(capabilities.END)[0]
    assert shown == table(BACKENDS), "outdated: run python scripts/make_capabilities_table.py"


SHAPES = {  # by which im2col chooses how to compute
    "no groups": {"groups": 1},
    "depthwise": {"groups": 4, "out_channels": 4},
    "pointwise": {"kernel_size": 1, "groups": 1, "dilation": 1},
    "kernel as large as the image": {"kernel_size": (3, 7), "groups": 1, "dilation": 1},
}


@pytest.mark.skipif(torch.__version__ < "2.15", reason="is not traced by older versions")
@pytest.mark.parametrize("shape", SHAPES)
def test_im2col_supports_each_use_for_every_shape(shape, monkeypatch):
    for option, value in SHAPES[shape].items():
        monkeypatch.setitem(interface.OPTIONS, option, value)
    for name, use in USES.items():
        if use not in LIMITS and use.function.__name__ not in SLOW:
            assert use.attempt(Im2colConv2d) == "", name


class OffByATwentieth(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, weight, bias) * 1.05


class Unsupported(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        raise NotImplementedError("not written\nyet")


@pytest.mark.parametrize("use", USES.values(), ids=lambda use: use.function.__name__)
def test_each_use_distinguishes_wrong_from_unsupported(use):
    if use is not meta:  # it compares no numbers
        with pytest.raises(AssertionError):
            use.attempt(OffByATwentieth)
    reason = use.attempt(Unsupported)
    assert "not written yet" in reason or reason.startswith("Unsupported: Observed exception")


def faulty(name, function):
    """NaiveConv2d with one of its three functions replaced."""
    return type("Faulty", (Conv2d,), {"algorithm": type("Faulty", (Naive,), {name: function})()})


FAULTS = [
    (
        faulty("grad_input", lambda self, *args: -Naive.grad_input(self, *args)),
        {"reverse_mode", "hooks", "complex_numbers"},
    ),
    (
        faulty("grad_weight", lambda self, g, x, *a: Naive.grad_weight(self, g[:1], x[:1], *a)),
        {"vmap_of_grad", "checkpointing", "autocast"},
    ),
    (  # vmap folds models into groups
        faulty(
            "forward",
            lambda self, x, w, g: Naive.forward(self, x.flip(1) if g.groups > 2 else x, w, g),
        ),
        {"vmap_weights", "vmap_of_grad"},
    ),
]


@pytest.mark.parametrize(("backend", "seen_by"), FAULTS)
def test_faults_are_found(backend, seen_by):
    found = [use for use in USES.values() if use.function.__name__ in seen_by]
    assert len(found) == len(seen_by)
    for use in found:
        with pytest.raises(AssertionError):
            use.attempt(backend)


def test_the_table_of_another_backend(tmp_path):
    few = {"hooks": hooks, "layout": channels_last_output}
    text = table({"mine": NaiveConv2d, "none": Unsupported}, few)
    assert text.splitlines() == [
        "|  | `mine` | `none` | why not |",
        "| --- | --- | --- | --- |",
        "| hooks | yes | no | NotImplementedError: not written yet |",
        f"| layout | no | no | {LIMITS[channels_last_output]} |",
    ]
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- capabilities -->\nold\n<!-- /capabilities -->\nafter\n")
    capabilities.write(page, text)
    assert re.split(r"<!-- /?capabilities -->\n", page.read_text()) == ["before\n", text, "after\n"]
    page.write_text("no markers\n")
    with pytest.raises(SystemExit, match="has no lines <!-- capabilities -->"):
        capabilities.write(page, text)
