"""Counts what one token costs in one decoder layer of a training step, on any machine: see `counter` and `arms`."""
