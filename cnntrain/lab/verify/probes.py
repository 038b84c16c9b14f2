"""What can be done with a layer beside calling it: the capability probes, in the report.

What any training program may do counts for the verdict, `REQUIRED`. The rest is reported as a note.
A wrong number always counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from cnntrain.lab.capabilities import CAPABILITIES, attempt, derivatives, programs, values
from cnntrain.lab.capabilities.twins import Backend, twins
from cnntrain.lab.verify.check import Finding, Subject, check


def by_keyword(backend: Backend) -> None:
    ours, reference, x = twins(backend)
    torch.testing.assert_close(ours(input=x), reference(x))


def meta(backend: Backend) -> None:
    ours, reference, x = twins(backend)
    assert ours.to("meta")(x.to("meta")).shape == reference(x).shape


PROBES = {"`layer(input=x)`": by_keyword, "the meta device": meta, **CAPABILITIES}
REQUIRED = [
    by_keyword,
    derivatives.first_derivatives,
    values.autocast,
    values.half_precision,
    values.padding_modes,
    values.unbatched_and_empty,
    values.any_strides,
    programs.copies,
    programs.checkpointing,
    programs.without_gradients,
    programs.hooks,
    programs.reparametrised,
]
SLOW = [  # not in the short form; most import PyTorch's compiler
    *(derivatives.second_derivatives, derivatives.forward_mode, derivatives.hessians),
    *(derivatives.vmap_of_grad, values.complex_numbers, values.distributed_tensors),
    *(programs.compile_whole, programs.compile_transforms, programs.trace),
    *(programs.export, programs.export_any_batch, programs.export_any_size),
    *(programs.symbolic_trace, programs.checkpointing, programs.repeatable),
    values.shapes_without_numbers,
]


@dataclass(frozen=True)
class Use:
    """Something that is done with a layer, by its name in the table of capabilities."""

    name: str
    elements = 0

    def call(self, name: str) -> str:
        return f"{name}, {self.name}"


@check(
    "uses of nn.Conv2d",
    cases=lambda s: [Use(n) for n, probe in PROBES.items() if not s.short or probe not in SLOW],
)
def uses(subject: Subject, use: Use) -> Iterator[Finding]:
    probe = PROBES[use.name]
    try:
        reason, counts = attempt(probe, subject.backend), probe in REQUIRED
    except AssertionError as error:  # a wrong number
        reason, counts = str(error).strip().split("\n")[0], True
    # Fourier's results are converted to integers as they are, and pickle needs an importable name.
    counts &= not (probe is values.integers and not subject.exact)
    counts &= not (probe is programs.copies and not subject.importable)
    yield Finding(float(bool(reason) and counts), reason, note=reason and f"{use.name}: {reason}")
