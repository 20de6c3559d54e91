"""The fit planner: whether a run fits on a card, how it would run, and how fast. No torch for the families it knows."""

from __future__ import annotations

from .cards import Card, card_of, this_machine
from .choose import Choice, choose
from .config import read_config, stored_parameters
from .report import fit_report, plan_recipe

__all__ = [
    "Card",
    "Choice",
    "card_of",
    "choose",
    "fit_report",
    "plan_recipe",
    "read_config",
    "stored_parameters",
    "this_machine",
]
