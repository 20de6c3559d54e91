"""The fit planner: does a run fit on a card, how would it run, how fast. Nothing here imports torch."""

from __future__ import annotations

from .cards import Card, card_of, this_machine
from .choose import Choice, Wanted, choose
from .config import read_config, stored_parameters
from .report import fit_report

__all__ = [
    "Card",
    "Choice",
    "Wanted",
    "card_of",
    "choose",
    "fit_report",
    "read_config",
    "stored_parameters",
    "this_machine",
]
