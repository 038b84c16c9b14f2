"""What `scripts/torture.py` does to trainings."""
