"""Runs that are broken in every way at hand, and whether each recovers: `python -m scripts.faults`."""
