"""Tables of committed measurements, written between marks into pages that are otherwise written by hand.

A mark is ``<!-- table: KIND FILE -->`` and ``<!-- end -->``; FILE is a name below docs/results without ``.json``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from typing import Any

from . import DOCS

RESULTS = DOCS / "results"
PAGES = ("results/signature.md", "results/ablations.md", "results/tune.md")
_MARK = re.compile(r"(<!-- table: (\S+) (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
_LOSS, _SCORE = ".3f", ".1f"
MEASURES = {
    "clean_train_loss": ("clean train loss", _LOSS),
    "held_out_loss": ("held-out loss", _LOSS),
    "loss.alpaca_loss": ("held-out loss, Alpaca", _LOSS),
    "loss.gpt4_loss": ("held-out loss, GPT-4's answers", _LOSS),
    "loss.dolly_loss": ("held-out loss, Dolly", _LOSS),
    "overfit.train_prompts_rouge_l": ("ROUGE-L on training prompts", _SCORE),
    "overfit.train_prompts_bleu": ("BLEU-4 on training prompts", _SCORE),
    "text.characters": ("characters of an answer", _SCORE),
    "text.whitespace_tokens": ("words of an answer", _SCORE),
}
IN_SHORT = ("clean_train_loss", "held_out_loss", "overfit.train_prompts_rouge_l")
Result = dict[str, Any]


def pages() -> dict[str, str]:
    """Return the pages with their tables regenerated: path below docs/, text."""
    return {page: filled((DOCS / page).read_text(encoding="utf-8")) for page in PAGES}


def filled(text: str) -> str:
    """Return a page with the tables between its marks regenerated."""

    def table(match: re.Match[str]) -> str:
        opening, kind, name, end = match.groups()
        result = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        return "".join([opening, "\n", *(f"{line}\n" for line in KINDS[kind](result)), "\n", end])

    return _MARK.sub(table, text)


# ---- Kinds of tables ----


def arms(result: Result) -> list[str]:
    """One row per measure, one column per arm: the mean over seeds, and the paired difference with its t interval."""
    columns = [_label(arm["settings"]) for arm in result["arms"]]
    lines = _head(["", *columns])
    for key, (label, form) in MEASURES.items():
        if key in result["measures"]:
            found = result["measures"][key]["arms"]
            lines.append(_line([label, *(f"{_mean(arm, form)}{_difference(arm, form)}" for arm in found)]))
    return lines


def settings(result: Result) -> list[str]:
    """One row per arm, one column per measure: the mean over seeds, and the paired difference with its t interval."""
    keys = [key for key in IN_SHORT if key in result["measures"]]
    lines = _head(["", *(MEASURES[key][0] for key in keys)])
    for number, arm in enumerate(result["arms"]):
        cells = [(result["measures"][key]["arms"][number], MEASURES[key][1]) for key in keys]
        lines.append(_line([_label(arm["settings"]), *(_mean(c, f) + _difference(c, f) for c, f in cells)]))
    return lines


def answers(result: Result) -> list[str]:
    """One row per way of answering, columns by alpha: means over the runs of length, repetition and log-diversity."""
    alphas = list(next(iter(result["ways"].values())))
    measures = {"characters": "characters", "repetition_2": "2-gram repetition, %", "log_diversity": "log-diversity"}
    lines = _head(["", *(f"{label}, alpha {alpha}" for label in measures.values() for alpha in alphas)])
    for name, by_alpha in result["ways"].items():
        values = [_average(run.get(key) for run in by_alpha[alpha].values()) for key in measures for alpha in alphas]
        lines.append(_line([name, *("-" if value is None else f"{value:.1f}" for value in values)]))
    return lines


def found_rates(result: Result) -> list[str]:
    """One row per setting: what a search found, and what whole runs say of it."""
    head = [
        "",
        "the search",
        "it found",
        "held-out loss of a whole run",
        "lowest of the grid",
        "difference",
        "at 2e-4",
        "best weights kept",
    ]
    lines = _head(head)
    for name, found in result.items():
        search, whole = found["search"], {point["rate"]: point["loss"] for point in found["whole"]}
        runs, (low, high) = search["rates"], search["interval"]
        cost = f"{len(runs)} runs; a whole run has {search['full_steps']} steps"
        edges = ", ".join(f"{edge:+.3f}" for edge in found["above_interval"])
        cells = [name, cost, f"{search['rate']:g}, between {low:g} and {high:g}", f"{found['found_loss']:.3f}"]
        cells += [f"{found['best_loss']:.3f} at {found['best_of_grid']:g}", f"{found['above']:+.3f} [{edges}]"]
        lines.append(_line([*cells, f"{whole[search['own_rate']]:.3f}", f"{found['kept_loss']:.3f}"]))
    return lines


KINDS: dict[str, Callable[[Result], list[str]]] = {
    "arms": arms,
    "settings": settings,
    "answers": answers,
    "found_rates": found_rates,
}


# ---- Their cells ----


def _head(cells: list[str]) -> list[str]:
    return [_line(cells), _line(["---"] * len(cells))]


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _label(stated: dict[str, Any]) -> str:
    """Return the settings of an arm, without those that have no effect in it."""
    shown = {key.split(".")[-1]: value for key, value in stated.items() if value is not None and value is not False}
    if not shown.get("noise_alpha", 1):
        shown = {
            key: value for key, value in shown.items() if key not in ("distribution", "adversarial_steps", "symmetric")
        }
    return ", ".join(f"{key} {_value(value)}" for key, value in shown.items())


def _value(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def _mean(cell: Result, form: str) -> str:
    return "-" if cell["mean"] is None else f"{cell['mean']:{form}}"


def _difference(cell: Result, form: str) -> str:
    found = cell.get("difference")
    if not found:
        return ""
    mean = f"{found['mean']:+{form}}"
    mean = f"**{mean}**" if found["measurable"] else mean
    return f"<br>{mean} [{', '.join(f'{edge:+{form}}' for edge in found['t_interval'])}]"


def _average(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
