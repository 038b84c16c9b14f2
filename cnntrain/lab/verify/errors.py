"""Checks that a backend refuses what ``nn.Conv2d`` refuses, with an exception of the same type."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from cnntrain.lab.verify.check import Finding, Subject, check


@dataclass(frozen=True)
class BadUse:
    """A line of Python: `options` follow (3, 4, 3), or are all there are where they have brackets
    of their own; `on` is what the layer is called with."""

    options: str = ""
    on: str = "torch.zeros(2, 3, 6, 6)"

    elements = 0

    def call(self, name: str) -> str:
        arguments = self.options if self.options.startswith("(") else f"(3, 4, 3{self.options})"
        return f"{name}{arguments}({self.on})"


X = BadUse.on
SHAPES = (
    "6, 6; 6; 1, 2, 3, 6, 6; 2, 4, 6, 6; 2, 1, 6, 6; 2, 0, 6, 6; 4, 6, 6; 2, 6, 6, 3; 2, 3, 0, 6; "
    "2, 3, 6, 0; 2, 3, 2, 6; 2, 3, 6, 2; 3, 2, 2; 0, 3, 2, 6; 0, 4, 6, 6"
)
DTYPES = "float64 bfloat16 int64 uint8 bool complex64"
BAD_USES = [
    # what the constructor refuses
    *(BadUse(f"({arguments})") for arguments in ("", "3", "3, 4", "3, 4, 3, strides=2")),
    *(BadUse(f"(4, 4, 3, groups={groups})") for groups in (0, -2, 3)),
    BadUse("(4, 6, 3, groups=4)"),
    *(BadUse(f", padding={padding!r}") for padding in ("full", "SAME", "")),
    *(BadUse(f", padding='same', stride={stride}") for stride in ("2", "(1, 2)", "(3, 1)")),
    *(BadUse(f", padding_mode={mode!r}") for mode in ("wrap", "constant", "Reflect", None)),
    *(BadUse(f"(3, 4, {size})") for size in ("None", "'3'", "(3, -1)")),
    # what calls refuse
    *(BadUse(on=f"torch.zeros({shape})") for shape in SHAPES.split("; ")),
    *(BadUse(on=on) for on in ("", "None", "[1.0]", "torch.tensor(1.0)", f"{X}, {X}")),
    *(BadUse(on=f"{X}.to(torch.{dtype})") for dtype in DTYPES.split()),
    BadUse("(4, 4, 3, groups=2)", "torch.zeros(2, 2, 6, 6)"),
    BadUse("(4, 4, 3, groups=2)", "torch.zeros(2, 8, 6, 6)"),
    BadUse("(4, 4, 3, groups=4)", "torch.zeros(2, 1, 6, 6)"),
    BadUse("(1, 4, 3)", "torch.zeros(2, 3, 6, 6)"),
    *(BadUse(f"(3, 4, {size})") for size in ("9", "(7, 1)", "(1, 7)", "0", "(3, 0)", "(3, 3, 3)")),
    *(BadUse(f", dilation={value}") for value in ("3", "(3, 1)", "(1, 3)")),
    *(BadUse(f"(3, 4, 9, padding={value})") for value in ("1", "(2, 1)", "(1, 2)")),
    *(
        BadUse(f", {option}={value}")
        for option in ("stride", "dilation")
        for value in ("0", "-1", "(1, 0)", "(0, 1)", "1.5", "(1, 1, 1)", "None")
    ),
    *(BadUse(f", padding={value}") for value in ("-1", "(0, -1)", "1.5", "(1, 1, 1)", "None")),
    BadUse(", padding=6, padding_mode='reflect'"),
    BadUse(", padding=(0, 6), padding_mode='reflect'"),
    BadUse(", padding=(7, 0), padding_mode='circular'"),
    BadUse(", padding=7, padding_mode='circular'"),
    BadUse("(3, 4, 12, padding=1, padding_mode='reflect')"),
    BadUse(", padding='same', dilation=7, padding_mode='reflect'"),
]


@check("errors that nn.Conv2d raises", cases=lambda _: BAD_USES)
def errors(subject: Subject, use: BadUse) -> Iterator[Finding]:
    expected, found = (_raised(kind, use, subject.device) for kind in (nn.Conv2d, subject.backend))
    right, wrong = (e and type(e).__name__ for e in (expected, found))
    text = f"raises {wrong or 'nothing'}, not {right or 'nothing'}"
    no_tensor = right == "TypeError" and wrong == "AttributeError"  # found out where it is used
    yield Finding(float(wrong != right and not no_tensor), text)


def _raised(
    kind: Callable[..., nn.Conv2d], use: BadUse, device: torch.device
) -> BaseException | None:
    try:
        with device:
            eval(use.call("Conv2d"), {"Conv2d": kind, "torch": torch})
    except (Exception, SystemExit) as error:
        return error
    return None
