"""Verification of convolutions against ``nn.Conv2d`` and independent oracles."""

from cnntrain.lab.verify.cases import Case
from cnntrain.lab.verify.check import CheckResult
from cnntrain.lab.verify.suite import VerificationReport, rerun, verify

__all__ = ["Case", "CheckResult", "VerificationReport", "rerun", "verify"]
