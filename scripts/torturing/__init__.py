"""Robustness tests of `scripts/torture.py`: kills and damaged files."""
