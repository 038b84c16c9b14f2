"""Faults that were written without knowledge of the checks: the lines that name their kind."""

import faults_by_others
import faults_by_others_later
import pytest

from cnntrain.lab.verify import verify

# The kind of a fault, and parts of the names of lines that may name it.
KINDS = {
    1: ["sizes", "small integers"],  # sizes at which implementations change
    2: ["parameters changed between calls"],  # a weight kept between calls
    3: ["every mode first, then every other"],  # the first call decides
    4: ["memory formats and strides", "nothing remembered"],  # in one dtype alone
    5: ["nothing remembered", "results in memory of their own", "nothing kept"],  # outputs reused
    6: ["nothing remembered"],  # options read once
    7: ["NaN, Inf and -0.0"],
    8: ["second derivatives"],
    9: ["12-bit integers", ", bfloat16", ", float16", "random layers"],  # narrow sums
    10: ["memory formats and strides"],
    11: ["global state left alone"],
    12: ["nothing kept after a call"],
    13: ["threads", "nothing remembered"],
    14: ["uses of nn.Conv2d", "copies and pickles", ", bfloat16", ", float16"],
}


FAULTS = [*faults_by_others.FAULTS.values(), *faults_by_others_later.FAULTS.values()]


@pytest.mark.parametrize(("kind", "layer"), FAULTS)
def test_a_fault_is_named(kind, layer):
    reports = (verify(layer, short=True, cases=40, only=part) for part in KINDS[kind])
    failed = [line for report in reports for line in report.lines if not line.passed]
    assert failed
    assert f"import {layer.__name__} as backend; " in failed[0].rerun


def test_there_are_faults_of_every_kind():
    assert {kind for kind, _ in FAULTS} == {*KINDS}
