"""A verdict on a convolution: whether it does what ``nn.Conv2d`` does, checked by other means.

- `cases.py`: the layers that it is tried on.
- `oracles.py`: what their outputs and gradients should be.
- `check.py`: what a check is.
- `numerics.py`, `rounding.py`, `behaviour.py`, `module.py`, `errors.py`: the checks.
- `contract.py`: all of them, and the report.
"""

from cnntrain.lab.verify.cases import Case
from cnntrain.lab.verify.check import Line
from cnntrain.lab.verify.contract import Report, rerun, verify
from cnntrain.lab.verify.errors import BadUse
from cnntrain.lab.verify.probes import Use

__all__ = ["BadUse", "Case", "Line", "Report", "Use", "rerun", "verify"]
