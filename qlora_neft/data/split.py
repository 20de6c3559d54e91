"""Holding rows out by what they say, not by where they stand."""

from __future__ import annotations


def unit_interval(digest: bytes) -> float:
    """The first 8 bytes of a hash as a number in [0, 1).

    A row is held out if its number is below the fraction to hold out: the same row falls on the same side on every
    machine, in every order and beside any other rows, and exact duplicates never straddle.
    """
    return int.from_bytes(digest[:8], "big") / 2**64
