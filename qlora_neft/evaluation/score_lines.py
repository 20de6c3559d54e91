"""A win rate for people. No torch."""

from __future__ import annotations

from typing import Any


def score_lines(found: dict[str, Any]) -> list[str]:
    """The lines of a score, from `alpaca_format.score`."""
    error, without = found["standard_error"], found["wins_without_draws"]
    spread = "" if error is None else f" ± {error:.2f} (standard error)"
    return [
        f"win rate                 {found['win_rate']:.2f}%{spread}",
        f"wins, losses, ties       {found['wins']}, {found['losses']}, {found['ties']} of {found['n']}",
        "wins without draws       " + ("-" if without is None else f"{without:.2f}%"),
        f"average length           {found['avg_length']} characters",
        found["length_controlled"],
    ]


def notes(found: dict[str, Any]) -> list[str]:
    """What a reader of the score must know."""
    lines = []
    if found["excluded"]:
        lines.append(f"{found['excluded']} annotations without a preference are left out")
    if found["not_annotated"]:
        lines.append(f"{found['not_annotated']} outputs are not the ones that were annotated; avg_length counts them")
    return lines
