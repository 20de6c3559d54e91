"""Measures of one name, told apart by how they were made: only like is compared with like. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .records import RunRecord

NOT_RECORDED = "not recorded"  # of measures that earlier versions stored


@dataclass(frozen=True)
class Kind:
    """A measure, made in one way.

    Attributes:
        key: The measure, as in `RunRecord.values`.
        made: How it was made; None if that was not recorded.
        difference: What tells it from the other kinds of its measure; empty if it is the only one.
    """

    key: str
    made: Mapping[str, Any] | None = None
    difference: str = ""

    @property
    def name(self) -> str:
        """Its key in ``results.json``."""
        return f"{self.key} ({self.difference})" if self.difference else self.key

    def is_of(self, run: RunRecord) -> bool:
        """Whether a run's measure was made in this way."""
        return _plain(run.made(self.key)) == _plain(self.made)


def kinds_of(key: str, runs: Sequence[RunRecord]) -> list[Kind]:
    """Return the ways in which a measure of some runs was made, in the order in which they appear."""
    found = {_plain(run.made(key)): run.made(key) for run in runs if key in run.values}
    if len(found) < 2:
        return [Kind(key, made) for made in found.values()]
    names = dict.fromkeys(name for made in found.values() for name in made or {})
    differing = [name for name in names if len({_plain((made or {}).get(name)) for made in found.values()}) > 1]
    return [Kind(key, made, _words(made, differing)) for made in found.values()]


def made_text(made: Mapping[str, Any] | None) -> str:
    """Say how a measure was made, in one line."""
    return NOT_RECORDED if made is None else _words(made, list(made)) or "as always"


def _words(made: Mapping[str, Any] | None, names: Sequence[str]) -> str:
    if made is None:
        return NOT_RECORDED
    # A hash says that two files differ; eight digits of it do.
    return ", ".join(
        f"{name.removesuffix('_sha256')} {str(made[name])[:8]}" if name.endswith("_sha256") else f"{name} {made[name]}"
        for name in names
        if name in made
    )


def _plain(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)
