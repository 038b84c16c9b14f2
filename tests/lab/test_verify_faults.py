"""`verify` catches injected faults, and passes correct convolutions of many kinds.

Here the search for a fault ends at the first failed case of the lines that have to report it;
scripts/verify_faults.py runs whole reports, in the short form and in full.
"""

import faults_of_state
import pytest
from all_faults import FAULTS, INDEPENDENT
from correct_convolutions import CORRECT
from faults import LINES, first_failure

from cnntrain.lab.verify import verify
from cnntrain.lab.verify.suite import CHECKS


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_reported(name):
    layer, lines = FAULTS[name]
    failed = first_failure(layer, *lines)
    assert failed is not None
    assert failed.error > failed.budget
    assert failed.failure.startswith(f"{layer.__name__}(") or "uses" in failed.name


def test_there_are_faults_of_every_kind_and_for_every_check():
    lines = {line for _, parts in FAULTS.values() for line in parts}
    unseen = [c.lines for c in CHECKS if not any(p in name for p in lines for name in c.lines)]
    assert unseen == []
    kinds = {parts for module in INDEPENDENT for _, parts in module.faults.values()}
    assert kinds == {tuple(parts) for parts in LINES.values()}
    assert sum(len(module.faults) for module in [*INDEPENDENT, faults_of_state]) == 155


PARTS = ["small integers", "bfloat16", "NaN", "nn.Conv2d", "threads"]


@pytest.mark.parametrize(
    ("layer", "only"),
    [(layer, PARTS[(i + j) % len(PARTS)]) for i, layer in enumerate(CORRECT) for j in (0, 2)],
)
def test_a_correct_convolution_passes(layer, only):
    """Two parts of each; the script runs all."""
    report = verify(layer, short=True, cases=5, seed=1, only=only)
    assert {line.name: line.failure for line in report.lines if not line.passed} == {}
